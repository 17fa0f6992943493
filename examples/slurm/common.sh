#!/usr/bin/env bash
# Shared by the job scripts of this folder; docs/slurm.md explains them. A job script sets RUN_DIRECTORY, sources this file
# and calls `train CONFIG key=value...` (or `run_tool`). This file holds what a job does, job.sh what it has, attempts.sh how
# it survives. All are plain bash around srun, without Ray and without fixed sleeps: they poll for what they wait for, with
# a deadline. They need Slurm 22.05 and bash 4.2, in which `set -u` forbids the expansion of an empty array.
set -Eeuo pipefail

# --- Settings ----------------------------------------------------------------------------------------------------------
# Set any of these before sbatch, which passes the environment on: RLVR_ENVIRONMENT=module:python,cuda sbatch ...

# Where Python comes from: venv:FOLDER, module:NAME,NAME..., pyxis:IMAGE (enroot) or apptainer:IMAGE.
: "${RLVR_ENVIRONMENT:=venv:.venv}"
# Folders that a container sees under the same paths, besides the project and the run directory; comma-separated.
: "${RLVR_MOUNTS:=}"
# SGLang servers: none, colocated (on every training node) or nodes:N (the last N nodes of the job, which do not train).
: "${RLVR_SERVERS:=none}"
# Training processes per node; by default one per GPU. Set it where Slurm does not manage the GPUs.
: "${RLVR_PROCESSES_PER_NODE:=}"
# The job gives up after this many attempts in a row without a new checkpoint.
: "${RLVR_MAX_TRIES:=3}"
# Deadlines of the whole preflight and of the start of all servers. The preflight takes seconds, or minutes when torch is
# read from a shared file system for the first time.
: "${RLVR_PREFLIGHT_SECONDS:=300}"
: "${RLVR_SERVER_SECONDS:=900}"
# 1: check the configuration, print the exact command of every step and one line per node, start nothing. With `ranks`, one
# line per rank. RLVR_DRY_RUN=1 bash examples/slurm/X.sbatch
: "${RLVR_DRY_RUN:=}"

# --- Network -----------------------------------------------------------------------------------------------------------
# NCCL finds NVLink and InfiniBand by itself on most clusters. If the preflight's bandwidth is far below the network's, or
# its all-reduce hangs, check these settings. Values from the environment are kept.
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interface for the first contact between nodes, such as ib0 or bond0
#   NCCL_IB_HCA                              adapters to use, such as mlx5 or =mlx5_0:1,mlx5_1:1; NCCL_IB_DISABLE=1: none
#   NCCL_DEBUG=INFO                          log what was chosen
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Keeps the communication of tensor and sequence parallelism in order with the computation that it depends on.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Reduces fragmentation between generation and updates.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# Threads of libraries other than torch; the configuration's `threads` sets torch's.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Open files, and memory that InfiniBand pins. Slurm passes on the limits of the submitting shell, which are often low.
raise_limit() { # OPTION VALUE: raise the soft limit to VALUE, or to the hard limit if that is lower
    local soft hard
    soft=$(ulimit -S "$1") hard=$(ulimit -H "$1")
    [ "$soft" != unlimited ] || return 0
    if [ "$2" = unlimited ] || { [ "$hard" != unlimited ] && [ "$hard" -lt "$2" ]; }; then
        ulimit -S "$1" "$hard"
    elif [ "$soft" -lt "$2" ]; then
        ulimit -S "$1" "$2"
    fi
}
raise_limit -n 65536
raise_limit -l unlimited

# --- Messages ----------------------------------------------------------------------------------------------------------
say() { printf '%s\n' "[$(date +%T)] $*"; }

refuse() { # REASON: a user error that is found before the first attempt begins
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# shellcheck source=examples/slurm/job.sh
source examples/slurm/job.sh
# shellcheck source=examples/slurm/attempts.sh
source examples/slurm/attempts.sh

# --- The stages of a training job --------------------------------------------------------------------------------------
# Check every node before training. Bad nodes are named and excluded from the next attempt.
preflight() {
    local code=0 reason verdict=$attempt/preflight/verdict
    start_step --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --wait=0 "${python[@]}" \
        -m megatron_rlvr.cluster.preflight --nodes="$(IFS=, && echo "${nodes[*]}")" --train-nodes="$train_nodes" \
        --processes-per-node="$RLVR_PROCESSES_PER_NODE" --servers="$RLVR_SERVERS" --endpoint="$head:$((port + 1))" \
        --report="$attempt/preflight" --seconds="$RLVR_PREFLIGHT_SECONDS" -- "${training[@]}"
    # A process whose file system hangs cannot end, so this script does not wait for srun much longer than for the verdict.
    wait_step "$verdict" $((RLVR_PREFLIGHT_SECONDS + 60)) || code=$?
    [ -z "$asked" ] || stopped
    [ -z "$RLVR_DRY_RUN" ] && [ "$code" != 0 ] || return 0
    if [ ! -s "$verdict" ]; then
        # The head writes the verdict. If only the other nodes have left reports, the head is the bad node.
        if [ -n "$(find "$attempt/preflight" -name '*.json' 2> /dev/null)" ] && [ ! -f "$attempt/preflight/$head.json" ]; then
            echo "69 $head did not run the preflight, other nodes did" > "$verdict"
            echo "$head" > "$attempt/preflight/bad_nodes"
        else
            fail 1 "the preflight ended with status $code and no verdict (its output is in the job's): does" \
                "RLVR_ENVIRONMENT=$RLVR_ENVIRONMENT work on the nodes?"
        fi
    fi
    read -r code reason < "$verdict"
    [ "$code" != 0 ] || return 0
    if [ "$code" = 69 ]; then
        printf '%s\n' "preflight: $reason" > "$RUN_DIRECTORY/slurm/reason"
        record "preflight: $reason"
        requeue "$(paste -sd, "$attempt/preflight/bad_nodes")"
    fi
    fail "$code" "preflight: $reason"
}

# Start the SGLang servers that CONFIG key=value... describe, wait until all answer, and add their URLs to `training`.
start_servers() {
    server_step=''
    [ "$RLVR_SERVERS" != none ] || return 0
    local count=$train_nodes first=0 deadline urls
    [ "$server_nodes" = 0 ] || count=$server_nodes first=$train_nodes
    # The servers demand this key, and the training processes send it. Environments are for this user alone, unlike arguments.
    if [ -z "${RLVR_SGLANG_KEY:-}" ]; then
        RLVR_SGLANG_KEY=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    fi
    export RLVR_SGLANG_KEY
    # Not --output, in which a percent sign of the run directory would be a pattern.
    step_output=$attempt/servers.log
    start_step --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --relative="$first" \
        "${python[@]}" -m megatron_rlvr.cluster.serve --folder="$attempt/servers" -- "$@"
    step_output=''
    if [ -n "$RLVR_DRY_RUN" ]; then
        training+=(rollout.engine=sglang "rollout.sglang.urls=[http://HOST:30000]")
        return
    fi
    server_step=$step step=''
    mkdir -p "$attempt/servers"
    echo run > "$attempt/servers/wanted"
    deadline=$((SECONDS + RLVR_SERVER_SECONDS))
    until [ "$(find "$attempt/servers" -maxdepth 1 -name "*.urls" 2> /dev/null | wc -l)" = "$count" ]; do
        [ -z "$asked" ] || stopped
        kill -0 "$server_step" 2> /dev/null ||
            fail 1 "the SGLang servers ended: $(grep -v '^srun:\|^slurmstepd' "$attempt/servers.log" | tail -n 1)"
        [ $SECONDS -lt $deadline ] ||
            fail 1 "the SGLang servers did not answer in RLVR_SERVER_SECONDS=$RLVR_SERVER_SECONDS s"
        pause 0.5
    done
    urls=$(cat "$attempt"/servers/*.urls | paste -sd,)
    training+=(rollout.engine=sglang "rollout.sglang.urls=[$urls]" "rollout.sglang.registry=$attempt/servers")
    say "SGLang servers: $urls"
}

# Run Python on the training nodes, under torchrun. Sets `status` and `reason` to how it ended.
launch() {
    local outcomes program=(-m megatron_rlvr.cluster.torchrun --nnodes="$train_nodes"
        --nproc-per-node="$RLVR_PROCESSES_PER_NODE" --rdzv-id="$SLURM_JOB_ID.$restart" --rdzv-endpoint="$head:$port" --logs="$attempt")
    [ -z "$asked" ] || stopped
    start_step --nodes="$train_nodes" --ntasks="$train_nodes" --ntasks-per-node=1 --relative=0 --kill-on-bad-exit=1 \
        "${python[@]}" "${program[@]}" -- "$@"
    if [ -n "$RLVR_DRY_RUN" ]; then describe_ranks "$@"; fi
    wait_step || true
    # srun exits with the largest status, which is not always the cause. A user error counts first, then a rank that was
    # killed (except by SIGABRT, 134, which can end a rank that lost another), then any other crash, then a stop. Of nodes
    # with equal weight the one that failed first counts: a line "at TIME" follows the line with its status and reason.
    read -r status reason < <(cat "$attempt"/outcome.* 2> /dev/null | awk '
        function compare() {
            if (line != "" && (weight > most || weight == most && time < first)) {
                most = weight; first = time; cause = line
            }
        }
        BEGIN { most = -1; cause = "137 the step was killed on every node" }
        $1 == "at" { time = $2; next }
        {
            compare()
            line = $0; time = 1e99
            weight = $1 == 2 ? 4 : $1 > 128 && $1 != 134 ? 3 : $1 == 75 ? 1 : $1 == 0 ? 0 : 2
        }
        END { compare(); print cause }')
    outcomes=$(find "$attempt" -maxdepth 1 -name "outcome.*" | wc -l)
    if [ -z "$asked" ] && [ "$outcomes" -lt "$train_nodes" ] && { [ "$status" = 0 ] || [ "$status" = 75 ]; }; then
        status=137 reason="the launcher of a node was killed"
    fi
}

# Check the configuration and print the commands of a dry run, with the Python of this machine, which may have no container.
describe_ranks() {
    local interpreter=${python[${#python[@]} - 1]} job_options=(--servers="$RLVR_SERVERS") status=0
    [ -z "$gpus" ] || job_options+=(--gpus="$gpus")
    "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
        refuse "$interpreter on $(uname -n) is older than Python 3.9: put a newer one first in PATH"
    "$interpreter" -m megatron_rlvr.cluster.dry_run --detail="$RLVR_DRY_RUN" \
        --nodes="$(IFS=, && echo "${trainers[*]}")" --processes-per-node="$RLVR_PROCESSES_PER_NODE" "${job_options[@]}" \
        -- "$@" || status=$?
    exit "$status"
}

train() { # CONFIG key=value...
    begin_attempt
    training=("$@" "run_directory=$RUN_DIRECTORY")
    preflight
    start_servers "${training[@]}"
    launch -m megatron_rlvr.train "${training[@]}"
    finish
}

# Evaluate a run on the training nodes, with servers as the run had them. It is requeued and resumed like training, but has
# no preflight.
evaluate() { # RUN [--initial] [--step N] key=value..., or RUN/checkpoints/step_N key=value...
    local word settings
    case ${1:-} in
        '' | -*) refuse "no run to evaluate: sbatch examples/slurm/evaluate.sbatch RUN [--initial] [key=value ...]" ;;
    esac
    settings=("${1%%/checkpoints/step_*}/config.yaml")
    [ -n "$RLVR_DRY_RUN" ] || [ -f "${settings[0]}" ] || refuse "no run in $1: it has no config.yaml"
    begin_attempt
    for word in "${@:2}"; do
        case $word in
            -*) ;;
            *=*) settings+=("$word") ;;
        esac
    done
    training=("$@")
    start_servers "${settings[@]}"
    launch tools/evaluate.py "${training[@]}"
    finish
}

# Run a program on the first node, to make files that training needs.
prepare() { # PROGRAM ARGUMENT...
    begin_attempt
    start_step --nodes=1 --ntasks=1 --nodelist="$head" "${python[@]}" "$@"
    wait_step || { [ -z "$asked" ] || stopped; fail 1 "$1 failed (its output is in the job's)"; }
}

# Run a tool under torchrun on the training nodes.
run_tool() {
    begin_attempt
    launch "$@"
    finish
}

# Ask the servers to end, and wait until they have removed their shared memory and sockets.
end_servers() {
    [ -n "$server_step" ] || return 0
    # srun would answer a signal by killing its tasks.
    echo stop > "$attempt/servers/wanted"
    for _ in $(seq 300); do
        kill -0 "$server_step" 2> /dev/null || break
        pause 0.1
    done
    kill "$server_step" 2> /dev/null || true
    server_step=''
}

finish() {
    [ "$asked" = TERM ] || end_servers
    case $status in
        0)
            record "done"
            rm -f "$RUN_DIRECTORY/slurm/tries" "$RUN_DIRECTORY/slurm/reason"
            end_attempt 0
            ;;
        75) stopped ;;
        *)
            [ -z "$asked" ] || stopped
            fail "$status" "$reason"
            ;;
    esac
}

# run_directory=... among the arguments of the job script replaces the script's own. The value is the text after the equals
# sign, as the trainer reads it (megatron_rlvr/config_yaml.py). What the two would read differently is refused.
choose_run_directory() {
    local argument
    for argument in "$@"; do
        case $argument in run_directory=*) RUN_DIRECTORY=${argument#*=} ;; esac
    done
    case ${RUN_DIRECTORY:-} in
        '' | '~' | null | Null | NULL) refuse "run_directory has no value: write run_directory=FOLDER" ;;
        [\'\"]*) refuse "run_directory=$(printf %q "$RUN_DIRECTORY") begins with a quotation mark: leave it out" ;;
    esac
    # The same path on all nodes and in containers.
    RUN_DIRECTORY=$(realpath -m -- "$RUN_DIRECTORY" && echo .)
    RUN_DIRECTORY=${RUN_DIRECTORY%??}
    # shellcheck disable=SC2016
    case $RUN_DIRECTORY in
        *[[:cntrl:]]*) refuse "run_directory=$(printf %q "$RUN_DIRECTORY") holds a control character: choose another name" ;;
        *'${'*) refuse "run_directory=$RUN_DIRECTORY holds \${, which begins a reference: a job script needs the path itself" ;;
    esac
}

server_step='' step_output='' training=()
choose_run_directory "$@"
describe_job
[ -n "$RLVR_DRY_RUN" ] || handle_signals
