#!/usr/bin/env bash
# What the scenarios of this folder share; docs/slurm.md explains it. A scenario is a few lines: it sets RUN_DIRECTORY,
# sources this file and calls `train CONFIG key=value...` (or `run_tool`). Here is what a job does, in attempts.sh how it
# survives. Both are plain bash around srun: there is no Ray and no fixed sleep; what must be waited for is polled, with a
# deadline. They need Slurm 22.05, and are written for bash 4.2, under whose set -u no empty array may be expanded.
set -Eeuo pipefail

# --- Settings ----------------------------------------------------------------------------------------------------------
# Set any of these before sbatch, which hands the environment on: RLVR_ENVIRONMENT=module:python,cuda sbatch ...

# Where Python comes from: venv:FOLDER, module:NAME,NAME..., pyxis:IMAGE (enroot) or apptainer:IMAGE.
: "${RLVR_ENVIRONMENT:=venv:.venv}"
# Folders that a container sees besides the project and the run's own, under the same paths: models, data. Comma-separated.
: "${RLVR_MOUNTS:=}"
# SGLang servers: none, colocated (on every training node) or nodes:N (the last N nodes of the job, which do not train).
: "${RLVR_SERVERS:=none}"
# Processes that train on a node; by default one a GPU. Set it where Slurm knows nothing of the GPUs.
: "${RLVR_PROCESSES_PER_NODE:=}"
# Attempts in a row that may end without a new checkpoint before the job gives up.
: "${RLVR_MAX_TRIES:=3}"
# Deadlines: the whole preflight, which takes seconds, but minutes where a shared file system hands out torch for the first
# time; all servers answering.
: "${RLVR_PREFLIGHT_SECONDS:=300}"
: "${RLVR_SERVER_SECONDS:=900}"
# 1 prints the exact command of every step and every rank, and starts nothing: RLVR_DRY_RUN=1 bash examples/slurm/X.sbatch
: "${RLVR_DRY_RUN:=}"

# --- Network -----------------------------------------------------------------------------------------------------------
# NCCL finds NVLink and InfiniBand by itself on most clusters. When the preflight's bandwidth is far below what the
# network has, or its all-reduce hangs, these are the settings to look at; whatever is set outside is kept.
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interface of the first contact between nodes, such as ib0 or bond0
#   NCCL_IB_HCA                              adapters to use, such as mlx5 or =mlx5_0:1,mlx5_1:1; NCCL_IB_DISABLE=1: none
#   NCCL_DEBUG=INFO                          say what was chosen
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Communication of tensor and sequence parallelism keeps its order behind the computation it waits for.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Less fragmentation between generation and updates.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# Threads of a process outside of torch, which has `threads` of the configuration.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Open files, and memory that InfiniBand pins: shells have low limits, which Slurm hands on with the environment.
raise_limit() { # OPTION VALUE: the soft limit, as far as the hard one lets it
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

# --- The job: what Slurm gave, or in a dry run what the script asks for ------------------------------------------------
say() { echo "[$(date +%T)] $*"; }

describe_job() {
    local count gpus
    if [ -n "$RLVR_DRY_RUN" ]; then # of what the script asks for, whatever job this shell may be in
        count=$(sed -n 's/^#SBATCH --nodes=//p' "$0")
        gpus=$(sed -n 's/^#SBATCH --gpus-per-node=//p' "$0")
        cpus=$(sed -n 's/^#SBATCH --cpus-per-task=//p' "$0")
        mapfile -t nodes < <(seq -f 'node-%g' 0 $((${count:-1} - 1)))
        SLURM_JOB_ID=JOB cpus=${cpus:-CPUS_OF_A_NODE}
        : "${RLVR_PROCESSES_PER_NODE:=${gpus:-1}}"
    elif [ -n "${SLURM_JOB_ID:-}" ]; then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        read_record
        : "${RLVR_PROCESSES_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
    else
        echo "error: this is a batch script: sbatch $0, or RLVR_DRY_RUN=1 bash $0 to see its commands" >&2
        exit 2
    fi
    server_nodes=0
    case $RLVR_SERVERS in
        none | colocated) ;;
        nodes:[1-9]*) server_nodes=$((${RLVR_SERVERS#nodes:})) ;;
        *) echo "error: RLVR_SERVERS is none, colocated or nodes:N, not '$RLVR_SERVERS'" >&2; exit 2 ;;
    esac
    train_nodes=$((${#nodes[@]} - server_nodes))
    if [ "$train_nodes" -lt 1 ]; then
        echo "error: RLVR_SERVERS=$RLVR_SERVERS leaves none of ${#nodes[@]} nodes to train: ask for more nodes" >&2
        exit 2
    fi
    # The order in which torchrun numbers nodes, so that rank 0 is on the head.
    mapfile -t trainers < <(printf '%s\n' "${nodes[@]:0:train_nodes}" | LC_ALL=C sort)
    nodes=("${trainers[@]}" "${nodes[@]:train_nodes}")
    head=${nodes[0]}
    # Another port for every attempt: what is left of the one before may still hold its own.
    port=$((20000 + (${SLURM_JOB_ID//[!0-9]/0} * 7 + restart * 3) % 12000))
}

# What is read from Slurm's record and not from the environment: which attempt this is, and of which job. sbatch hands its
# own environment on, so a job that is submitted from within another one has that one's SLURM_* variables, except those
# that Slurm sets for it. From an element of an array it would requeue that array; from an interactive session on one core
# its steps would get one core; and srun refuses two ways of asking for memory at once.
read_record() {
    local record name version
    version=$(srun --version | sed -n 's/.* \([0-9]*\)\.\([0-9]*\).*/\1\2/p')
    if [ "${version:-9999}" -lt 2205 ]; then
        echo "error: $(srun --version) is too old: before 22.05 the steps of a job cannot share its memory and GPUs" >&2
        exit 2
    fi
    record=$(job_record)
    [[ ! $record =~ ' Restarts='([0-9]+) ]] || restart=${BASH_REMATCH[1]}
    job=$SLURM_JOB_ID
    # To scontrol, the number of one element of an array may mean the whole array.
    [[ ! $record =~ ' ArrayJobId='([0-9]+)' ArrayTaskId='([0-9]+)' ' ]] || job=${BASH_REMATCH[1]}_${BASH_REMATCH[2]}
    # The cores of a node, of the smallest one where they differ.
    cpus=$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
    # SLURM_EXPORT_ENV is of sbatch --export, which would keep the variables of this script from its own steps.
    for name in EXPORT_ENV MEM_PER_NODE MEM_PER_CPU MEM_PER_GPU CPUS_PER_TASK CPUS_PER_GPU TRES_PER_TASK GPUS_PER_TASK \
        NTASKS_PER_GPU NTASKS_PER_SOCKET NTASKS_PER_CORE CPU_BIND CPU_BIND_TYPE CPU_BIND_LIST CPU_BIND_VERBOSE \
        GPU_BIND DISTRIBUTION; do
        unset "SLURM_$name"
    done
    # A job that asked for GPUs, or for whole nodes, has been told which.
    [[ $record =~ gres[:/]gpu|OverSubscribe=NO ]] ||
        unset SLURM_GPUS SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_JOB_GPUS
}

# How a step on the nodes is started, and how Python is: `step_options` and `python`.
describe_environment() {
    local kind=${RLVR_ENVIRONMENT%%:*} value=${RLVR_ENVIRONMENT#*:} modules folder mounts=$PWD:$PWD
    for folder in "$RUN_DIRECTORY" ${RLVR_MOUNTS//,/ }; do mounts+=,$folder:$folder; done
    # Steps share all that the job has; without saying so, a step gets one core, and memory for that.
    step_options=(--overlap --mem=0 --cpus-per-task="$cpus")
    case $kind in
        venv) python=("$value/bin/python") ;;
        module)
            python=(python3)
            IFS=, read -ra modules <<< "$value"
            [ -n "$RLVR_DRY_RUN" ] || load_modules "${modules[@]}"
            ;;
        pyxis)
            python=(python3)
            step_options+=(--container-image="$value" --container-workdir="$PWD" --container-mounts="$mounts")
            ;;
        apptainer) python=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$value" python3) ;;
        *) echo "error: RLVR_ENVIRONMENT begins with venv:, module:, pyxis: or apptainer:, not '$kind'" >&2; exit 2 ;;
    esac
    if [ "$kind" = venv ] && [ ! -x "${python[0]}" ]; then
        echo "error: no ${python[0]}: \`make setup\` in $PWD makes it, RLVR_ENVIRONMENT names another" >&2
        exit 2
    fi
}

# A batch script is no login shell, and may have been submitted from one that is not bash: `module` has to be found first.
# Neither its definition nor the modules are written for set -eu.
load_modules() {
    local file status=0
    set +Eeu
    for file in "$LMOD_PKG/init/bash" "$MODULESHOME/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh \
        /usr/share/{lmod/lmod,modules}/init/bash; do
        ! type module > /dev/null 2>&1 || break
        # shellcheck disable=SC1090
        [ ! -r "$file" ] || source "$file"
    done
    module load "$@"
    status=$?
    set -Eeu
    if [ "$status" != 0 ] || ! command -v "${python[0]}" > /dev/null; then
        echo "error: \`module load $*\` on $(uname -n) ended with status $status and gave no python3:" \
            "RLVR_ENVIRONMENT=module:NAME,NAME... names modules that the nodes have" >&2
        exit 2
    fi
}

# shellcheck source=examples/slurm/attempts.sh
source examples/slurm/attempts.sh

# --- The parts of a training job ---------------------------------------------------------------------------------------
# Check every node before training; a bad one is named, and left out of the next attempt.
preflight() {
    local code=0 reason verdict=$attempt/preflight/verdict
    start_step --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --wait=0 "${python[@]}" \
        -m megatron_rlvr.cluster.preflight --nodes="$(IFS=, && echo "${nodes[*]}")" --train-nodes="$train_nodes" \
        --processes-per-node="$RLVR_PROCESSES_PER_NODE" --servers="$RLVR_SERVERS" --endpoint="$head:$((port + 1))" \
        --report="$attempt/preflight" --seconds="$RLVR_PREFLIGHT_SECONDS" -- "${training[@]}"
    # Nothing in a process ends it while its file system hangs, so srun is not waited for much longer than for the verdict.
    wait_step "$verdict" $((RLVR_PREFLIGHT_SECONDS + 60)) || code=$?
    [ -z "$asked" ] || stopped
    [ -z "$RLVR_DRY_RUN" ] && [ "$code" != 0 ] || return 0
    if [ ! -s "$verdict" ]; then
        # The head says the verdict; where it could not, the others have left their reports, and it is the bad one.
        if compgen -G "$attempt/preflight/*.json" > /dev/null && [ ! -f "$attempt/preflight/$head.json" ]; then
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
        echo "preflight: $reason" > "$RUN_DIRECTORY/slurm/reason"
        record "preflight: $reason"
        requeue "$(paste -sd, "$attempt/preflight/bad_nodes")"
    fi
    fail "$code" "preflight: $reason"
}

# Start the SGLang servers that CONFIG key=value... describe and wait until all answer; `training` then names them.
start_servers() {
    server_step=''
    [ "$RLVR_SERVERS" != none ] || return 0
    local count=$train_nodes first=0 deadline urls
    [ "$server_nodes" = 0 ] || count=$server_nodes first=$train_nodes
    start_step --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --relative="$first" \
        --output="$attempt/servers-%N.log" "${python[@]}" -m megatron_rlvr.cluster.serve --folder="$attempt/servers" "$@"
    if [ -n "$RLVR_DRY_RUN" ]; then
        training+=(rollout.engine=sglang "rollout.sglang.urls=[http://HOST:PORT,...]")
        return
    fi
    server_step=$step step=''
    deadline=$((SECONDS + RLVR_SERVER_SECONDS))
    until [ "$(find "$attempt" -path "*/servers/*.urls" | wc -l)" = "$count" ]; do
        [ -z "$asked" ] || stopped
        kill -0 "$server_step" 2> /dev/null ||
            fail 1 "the SGLang servers ended: $(cat "$attempt"/servers-*.log | tail -n 1)"
        [ $SECONDS -lt $deadline ] ||
            fail 1 "the SGLang servers did not answer in RLVR_SERVER_SECONDS=$RLVR_SERVER_SECONDS s"
        pause 0.5
    done
    urls=$(cat "$attempt"/servers/*.urls | paste -sd,)
    training+=(rollout.engine=sglang "rollout.sglang.urls=[$urls]")
    say "SGLang servers: $urls"
}

# Run Python on the training nodes, under torchrun; what became of it is then in status and reason.
launch() {
    local told program=(-m megatron_rlvr.cluster.torchrun --nnodes="$train_nodes"
        --nproc-per-node="$RLVR_PROCESSES_PER_NODE" --rdzv-id="$SLURM_JOB_ID.$restart" --rdzv-endpoint="$head:$port" --logs="$attempt")
    [ -z "$asked" ] || stopped
    start_step --nodes="$train_nodes" --ntasks="$train_nodes" --ntasks-per-node=1 --relative=0 --kill-on-bad-exit=1 \
        "${python[@]}" "${program[@]}" -- "$@"
    if [ -n "$RLVR_DRY_RUN" ]; then # by the Python of this machine: there may be no container here
        if ! "${python[@]: -1}" -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then
            echo "error: ${python[*]: -1} on $(uname -n) is older than Python 3.9: put a newer one first in PATH" >&2
            exit 2
        fi
        PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "${python[@]: -1}" "${program[@]}" \
            --dry-run="$(IFS=, && echo "${trainers[*]}")" -- "$@"
        exit 0
    fi
    wait_step || true
    # srun exits with the largest status, which says nothing about the cause. A user error counts first, then a rank that
    # was killed (134 is SIGABRT, by which a rank that lost another may end), then any other crash, then a stop. Among
    # equals the node that failed first counts: the line "at TIME" follows the line with its status and reason.
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
    told=$(find "$attempt" -maxdepth 1 -name "outcome.*" | wc -l)
    if [ -z "$asked" ] && [ "$told" -lt "$train_nodes" ] && { [ "$status" = 0 ] || [ "$status" = 75 ]; }; then
        status=137 reason="the launcher of a node was killed"
    fi
}

train() { # CONFIG key=value...
    begin_attempt
    training=("$@" "run_directory=$RUN_DIRECTORY")
    preflight
    start_servers "${training[@]}"
    launch -m megatron_rlvr.train "${training[@]}"
    finish
}

# Evaluate a run on the training nodes, with servers as it had them; the same survival but no preflight.
evaluate() { # RUN [--initial] key=value...
    local word settings=("${1:?the directory of a run}/config.yaml")
    begin_attempt
    for word in "${@:2}"; do
        case $word in *=*) settings+=("$word") ;; esac
    done
    training=("$@")
    start_servers "${settings[@]}"
    launch tools/evaluate.py "${training[@]}"
    finish
}

# What has to be there before, made on the first node.
prepare() { # PROGRAM ARGUMENT...
    begin_attempt
    start_step --nodes=1 --ntasks=1 --nodelist="$head" "${python[@]}" "$@"
    wait_step || { [ -z "$asked" ] || stopped; fail 1 "$1 failed (its output is in the job's)"; }
}

# A tool under torchrun on the training nodes.
run_tool() {
    begin_attempt
    launch "$@"
    finish
}

finish() {
    [ -z "$server_step" ] || kill "$server_step" 2> /dev/null || true
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

# run_directory=... among the script's arguments chooses another one.
for argument in "$@"; do
    case $argument in run_directory=*) RUN_DIRECTORY=${argument#run_directory=} ;; esac
done
# The same path on all nodes and in containers.
RUN_DIRECTORY=$(realpath -m "${RUN_DIRECTORY:?the scenario sets it before it sources common.sh}")
server_step='' training=()
describe_job
[ -n "$RLVR_DRY_RUN" ] || heed_signals
