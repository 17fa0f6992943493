#!/usr/bin/env bash
# How a job survives: signals, attempts and their history, requeueing, and an end to crash loops. Sourced by common.sh,
# which sets the variables of the job.

# --- Steps and signals -------------------------------------------------------------------------------------------------
# Before the time limit Slurm sends USR1 to this script alone (--signal=B:USR1@SECONDS). The script passes it on to the
# running step: the ranks finish their training step, save, and end with status 75. TERM means that Slurm is ending the
# job (scancel, preemption, a node that failed). Slurm then also sends it to the ranks, which save what they can before
# they are killed.
asked='' interrupted='' step=''
# Set by job.sh: the job's name for scontrol, the number of the attempt, the first node. By common.sh: how and why training
# ended.
job='' restart=0 head='' status='' reason=''
# The checkpoint that this attempt began from.
checkpoint=''

handle_signals() {
    trap on_usr1 USR1
    trap on_term TERM
}

on_usr1() {
    asked=USR1 interrupted=1
    say "asked to stop (USR1): the step in progress will be finished and saved"
    [ -z "$step" ] || kill -USR1 "$step" 2> /dev/null || true
}

on_term() {
    asked=TERM interrupted=1
    [ -z "${attempt:-}" ] || touch "$attempt/ended"
    say "Slurm is ending this job"
}

# An unexpected error of this script also counts as a failed attempt.
on_error() {
    [ "$BASH_SUBSHELL" = 0 ] || exit 1
    trap - ERR
    fail 1 "the batch script failed at line $1 of ${2##*/}"
}

# Sleep between two checks. Slurm's TERM also ends a sleep, which must not fail this script.
pause() { sleep "$1" || true; }

# Start srun with these arguments in the background, with its output appended to `step_output` if that is set. In a dry run,
# print the command instead.
start_step() {
    local command=(srun "${step_options[@]}" "$@")
    if [ -n "$RLVR_DRY_RUN" ]; then
        printf '%q ' "${command[@]}"
        printf '\n\n'
        return
    fi
    if [ -n "$step_output" ]; then
        "${command[@]}" >> "$step_output" 2>&1 &
    else
        "${command[@]}" &
    fi
    step=$!
}

# wait_step [FILE SECONDS]: wait for the step that was started last, and handle signals meanwhile. The step is killed five
# seconds after FILE appears, and after SECONDS in any case.
wait_step() {
    local status=0 deadline=$((SECONDS + ${2:-0})) written=''
    [ -z "$RLVR_DRY_RUN" ] || return 0
    while [ -n "${1:-}" ] && kill -0 "$step" 2> /dev/null; do
        if [ -z "$written" ] && [ -s "$1" ]; then
            written=1
            [ $((SECONDS + 5)) -gt $deadline ] || deadline=$((SECONDS + 5))
        fi
        if [ $SECONDS -ge $deadline ]; then
            say "a process of the step does not end; continuing without it"
            kill -KILL "$step" 2> /dev/null || true
            break
        fi
        pause 0.2
    done
    while :; do
        interrupted=''
        wait "$step" && status=0 || status=$?
        [ -n "$interrupted" ] || break
    done
    step=''
    return "$status"
}

# --- Attempts: RUN_DIRECTORY/slurm/history records how each of them ended ----------------------------------------------
record() {
    say "$*"
    printf '%s\n' "$(date +%FT%T) job $SLURM_JOB_ID attempt $restart: $*" >> "$RUN_DIRECTORY/slurm/history"
}

begin_attempt() {
    [ -z "${attempt:-}" ] || return 0
    describe_environment
    attempt=$RUN_DIRECTORY/slurm/$SLURM_JOB_ID.$restart
    [ -z "$RLVR_DRY_RUN" ] || return 0
    mkdir -p "$attempt"
    trap 'on_error $LINENO "${BASH_SOURCE[0]}"' ERR
    local before=none tries=0
    checkpoint=$(newest_checkpoint)
    if [ -f "$RUN_DIRECTORY/slurm/tries" ]; then
        read -r tries before < "$RUN_DIRECTORY/slurm/tries"
        [[ $before = "$checkpoint" && $tries =~ ^[0-9]{1,9}$ ]] || tries=0
    fi
    if [ "$tries" -ge "$RLVR_MAX_TRIES" ]; then
        record "gave up: $tries attempts from $checkpoint ended without a new checkpoint, the last because of:" \
            "$(cat "$RUN_DIRECTORY/slurm/reason" 2> /dev/null || echo 'no reason was recorded; see the logs next to this file')"
        # If the user submits the job again, counting starts from zero.
        rm -f "$RUN_DIRECTORY/slurm/tries"
        end_attempt 1
    fi
    tries=$((10#$tries + 1))
    set_tries "$tries" "$checkpoint"
    record "try $tries from $checkpoint on $SLURM_JOB_NODELIST"
    srun --overlap --mem=0 --cpus-per-task=1 --nodes=1 --ntasks=1 --nodelist="$head" --gres=none \
        bash -c "$(declare -f guard job_field)"$'\n''guard "$@"' guard "$attempt" "$job" >> "$attempt/guard.log" 2>&1 &
    guard_step=$!
}

set_tries() {
    echo "$*" > "$RUN_DIRECTORY/slurm/tries.partial"
    mv "$RUN_DIRECTORY/slurm/tries.partial" "$RUN_DIRECTORY/slurm/tries"
}

# A separate step, which outlives this script by the seconds that Slurm takes to end a job. If this script was killed (by
# SIGKILL, or for its memory), only the guard can ask for another attempt.
guard() {
    trap 'kill $! 2> /dev/null' TERM
    sleep infinity &
    wait $!
    for _ in $(seq 20); do
        [ ! -e "$1/ended" ] || exit 0
        if [[ $(scontrol show job "$2" | job_field ExitCode) = 0:[1-9]* ]]; then
            echo "the batch script was killed; asking for another attempt"
            exec scontrol requeue "$2"
        fi
        sleep 0.5
    done
}

end_attempt() {
    touch "$attempt/ended"
    [ -z "${guard_step:-}" ] || kill "$guard_step" 2> /dev/null || true
    exit "$1"
}

# Print Slurm's record of this job. The controller may not answer for some minutes. scontrol shows an array element by
# element.
job_record() {
    for _ in $(seq 150); do
        if scontrol show job "$SLURM_JOB_ID" |
            awk -v first="JobId=$SLURM_JOB_ID" '/^JobId=/ { own = $1 == first; found += own } own; END { exit !found }'; then
            return
        fi
        pause 2
    done
    return 1
}

# job_field NAME: a field of the record in stdin. The job's name, the script and its folders can hold any text, also that of
# a field. So this reads only the lines that begin with fields of Slurm's own, and of several the last.
job_field() {
    sed -n "/^   \(JobState\|Requeue\|ReqNodeList\)=/s/^ *\(.* \)\{0,1\}$1=\([^ (]*\).*/\2/p" | tail -n 1
}

# Ask Slurm for another attempt, without the nodes in $1. Only the attempt that Slurm knows as the current one may do so:
# an attempt that outlived its node must not end its successor.
requeue() {
    local slurm_record excluded
    slurm_record=$(job_record)
    if [ "$(job_field Restarts <<< "$slurm_record")" != "$restart" ]; then
        record "Slurm has started another attempt already"
        end_attempt 75
    fi
    if [ "$(job_field Requeue <<< "$slurm_record")" != 1 ]; then
        record "this job may not be requeued (--no-requeue): submit it again to continue"
        end_attempt 75
    fi
    touch "$attempt/ended"
    trap '' TERM # requeueing also ends this script
    scontrol requeue "$job" || true
    # Nodes can be excluded only while the job waits for its next attempt.
    if [ -n "$1" ]; then
        excluded=$(job_field ExcNodeList <<< "$slurm_record")
        for _ in $(seq 100); do
            if scontrol update JobId="$job" ExcNodeList="${excluded:+$excluded,}$1"; then
                record "the next attempt leaves out ${excluded:+$excluded,}$1"
                end_attempt 75
            fi
            pause 0.2
        done
        record "Slurm did not let the next attempt leave out $1"
    fi
    end_attempt 75
}

fail() { # STATUS REASON: end this attempt; the line that gives up names the last reason
    printf '%s\n' "${*:2}" > "$RUN_DIRECTORY/slurm/reason"
    case $1 in
        2)
            record "refused: ${*:2}"
            end_attempt 2
            ;;
        *)
            record "failed: ${*:2}"
            [ "$asked" != TERM ] || end_attempt 75
            requeue ""
            ;;
    esac
}

newest_checkpoint() { cat "$RUN_DIRECTORY/checkpoints/latest" 2> /dev/null || echo "the beginning"; }

stopped() {
    case $asked:$status in
        TERM:*) # not a fault of the run
            set_tries 0 "$(newest_checkpoint)"
            reason=''
            ;;
        USR1: | USR1:75)
            reason=''
            [ "$(newest_checkpoint)" != "$checkpoint" ] ||
                reason="asked before a step was finished: the time limit must be longer than the seconds of --signal"
            ;;
        USR1:*)
            # If a checkpoint was saved anyway, the reason is how training ended.
            [ "$(newest_checkpoint)" != "$checkpoint" ] ||
                reason="the time limit came before a step was finished and saved: raise the seconds of --signal"
            ;;
    esac
    [ -z "$reason" ] || printf '%s\n' "$reason" > "$RUN_DIRECTORY/slurm/reason"
    record "stopped (${asked:-by itself}${reason:+: $reason}); the newest checkpoint is $(newest_checkpoint)"
    if [ "$asked" = TERM ] && [ "$(job_record | job_field Reason)" != TimeLimit ]; then
        end_attempt 75 # cancelled, preempted or a lost node: Slurm decides whether there is another attempt
    fi
    requeue ""
}
