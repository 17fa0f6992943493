#!/usr/bin/env bash
# What the scenarios of this folder share; docs/slurm.md explains it. A scenario is a few lines: it sets RUN_DIRECTORY,
# sources this file and calls `train CONFIG key=value...` (or `run_tool`). Here is what a job does, in attempts.sh how it
# survives. Both are plain bash around srun: there is no Ray and no fixed sleep; what must be waited for is polled, with a
# deadline.
set -Eeuo pipefail

# --- Settings ----------------------------------------------------------------------------------------------------------
# Set any of these before sbatch, which hands the environment on: RLVR_ENVIRONMENT=module:python,cuda sbatch ...

# Where Python comes from: venv:FOLDER, module:NAME,NAME..., pyxis:IMAGE (enroot) or apptainer:IMAGE.
: "${RLVR_ENVIRONMENT:=venv:.venv}"
# Folders that a container sees besides the project, under the same paths: models, data, runs. Comma-separated.
: "${RLVR_MOUNTS:=}"
# SGLang servers: none, colocated (on every training node) or nodes:N (the last N nodes of the job, which do not train).
: "${RLVR_SERVERS:=none}"
# Processes that train on a node.
: "${RLVR_PROCESSES_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
# Attempts in a row that may end without a new checkpoint before the job gives up.
: "${RLVR_MAX_TRIES:=3}"
# Deadlines: the whole preflight; all servers answering.
: "${RLVR_PREFLIGHT_SECONDS:=120}"
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
# A process computes on its share of the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# --- The job: what Slurm gave, or in a dry run outside of it what the script asks for -----------------------------------
say() { echo "[$(date +%T)] $*"; }

describe_job() {
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    elif [ -n "$RLVR_DRY_RUN" ]; then
        local count gpus
        count=$(sed -n 's/^#SBATCH --nodes=//p' "$0")
        gpus=$(sed -n 's/^#SBATCH --gpus-per-node=//p' "$0")
        mapfile -t nodes < <(seq -f 'node-%g' 0 $((${count:-1} - 1)))
        SLURM_JOB_ID=JOB
        RLVR_PROCESSES_PER_NODE=${gpus:-$RLVR_PROCESSES_PER_NODE}
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
    restart=${SLURM_RESTART_COUNT:-0}
    # To scontrol, the number of one element of an array may mean the whole array.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    # Another port for every attempt: what is left of the one before may still hold its own.
    port=$((20000 + (${SLURM_JOB_ID//[!0-9]/0} * 7 + restart * 3) % 12000))
    # srun no longer takes this over from sbatch; without it a task gets one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
}

describe_environment() {
    local kind=${RLVR_ENVIRONMENT%%:*} value=${RLVR_ENVIRONMENT#*:} modules folder mounts=$PWD:$PWD
    for folder in ${RLVR_MOUNTS//,/ }; do mounts+=,$folder:$folder; done
    container=() prefix=()
    case $kind in
        venv) python=$value/bin/python ;;
        module)
            python=python3
            IFS=, read -ra modules <<< "$value"
            [ -n "$RLVR_DRY_RUN" ] || module load "${modules[@]}"
            ;;
        pyxis)
            python=python3
            container=(--container-image="$value" --container-workdir="$PWD" --container-mounts="$mounts")
            ;;
        apptainer)
            python=python3
            prefix=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$value")
            ;;
        *) echo "error: RLVR_ENVIRONMENT begins with venv:, module:, pyxis: or apptainer:, not '$kind'" >&2; exit 2 ;;
    esac
    if [ "$kind" = venv ] && [ ! -x "$python" ]; then
        echo "error: no $python: \`make setup\` in $PWD makes it, RLVR_ENVIRONMENT names another" >&2
        exit 2
    fi
}

# shellcheck source=examples/slurm/attempts.sh
source examples/slurm/attempts.sh

# --- The parts of a training job ---------------------------------------------------------------------------------------
# Check every node before training; a bad one is named, and left out of the next attempt.
preflight() {
    local status=0
    start_step --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --wait=0 "${container[@]}" \
        "${prefix[@]}" "$python" -m megatron_rlvr.cluster.preflight --nodes="$(IFS=, && echo "${nodes[*]}")" \
        --train-nodes="$train_nodes" --processes-per-node="$RLVR_PROCESSES_PER_NODE" --endpoint="$head:$((port + 1))" \
        --report="$attempt/preflight" --seconds="$RLVR_PREFLIGHT_SECONDS" -- "$@"
    wait_step || status=$?
    [ -z "$asked" ] || stopped
    [ -z "$RLVR_DRY_RUN" ] && [ "$status" != 0 ] || return 0
    local verdict=$attempt/preflight/verdict
    if [ ! -s "$verdict" ]; then
        # The head says the verdict; where it could not, the others have left their reports, and it is the bad one.
        if compgen -G "$attempt/preflight/*.json" > /dev/null && [ ! -f "$attempt/preflight/$head.json" ]; then
            echo "69 $head did not run the preflight, other nodes did" > "$verdict"
            echo "$head" > "$attempt/preflight/bad_nodes"
        else
            fail 1 "the preflight ended with status $status and no verdict (its output is in the job's): does" \
                "RLVR_ENVIRONMENT=$RLVR_ENVIRONMENT work on the nodes?"
        fi
    fi
    read -r status reason < "$verdict"
    if [ "$status" = 69 ]; then
        echo "preflight: $reason" > "$RUN_DIRECTORY/slurm/reason"
        record "preflight: $reason"
        requeue "$(paste -sd, "$attempt/preflight/bad_nodes")"
    fi
    fail "$status" "preflight: $reason"
}

# Start the SGLang servers and wait until all answer; their addresses are then in server_override.
start_servers() {
    server_override=() server_step=''
    [ "$RLVR_SERVERS" != none ] || return 0
    local count=$train_nodes first=0 deadline urls
    [ "$server_nodes" = 0 ] || count=$server_nodes first=$train_nodes
    start_step --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --relative="$first" \
        --output="$attempt/servers-%N.log" "${container[@]}" "${prefix[@]}" \
        "$python" -m megatron_rlvr.cluster.serve --folder="$attempt/servers" "$@"
    if [ -n "$RLVR_DRY_RUN" ]; then
        server_override=(rollout.engine=sglang "rollout.sglang.urls=[http://HOST:PORT,...]")
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
        sleep 0.5
    done
    urls=$(cat "$attempt"/servers/*.urls | paste -sd,)
    server_override=(rollout.engine=sglang "rollout.sglang.urls=[$urls]")
    say "SGLang servers: $urls"
}

# Run Python on the training nodes, under torchrun; what became of it is then in status and reason.
launch() {
    local program=("$python" -m megatron_rlvr.cluster.torchrun --nnodes="$train_nodes"
        --nproc-per-node="$RLVR_PROCESSES_PER_NODE" --rdzv-id="$SLURM_JOB_ID.$restart" --rdzv-endpoint="$head:$port" --logs="$attempt")
    start_step --nodes="$train_nodes" --ntasks="$train_nodes" --ntasks-per-node=1 --relative=0 --kill-on-bad-exit=1 \
        "${container[@]}" "${prefix[@]}" "${program[@]}" -- "$@"
    if [ -n "$RLVR_DRY_RUN" ]; then
        PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "${program[@]}" --dry-run="$(IFS=, && echo "${trainers[*]}")" -- "$@"
        exit 0
    fi
    local told
    wait_step || true
    # srun says the largest status; what counts is what the user can mend, then a rank that was killed (134 is abort, by
    # which a rank that misses another may end), then any other crash, then a stop.
    read -r status reason < <(cat "$attempt"/outcome.* 2> /dev/null | awk '
        { weight = $1 == 2 ? 4 : $1 > 128 && $1 != 134 ? 3 : $1 == 75 ? 1 : $1 == 0 ? 0 : 2 }
        NR == 1 || weight > most { most = weight; line = $0 }
        END { print NR ? line : "137 the step was killed on every node" }')
    told=$(find "$attempt" -maxdepth 1 -name "outcome.*" | wc -l)
    if [ -z "$asked" ] && [ "$told" -lt "$train_nodes" ] && { [ "$status" = 0 ] || [ "$status" = 75 ]; }; then
        status=137 reason="the launcher of a node was killed"
    fi
}

train() {
    begin_attempt
    set -- "$@" "run_directory=$RUN_DIRECTORY"
    preflight "$@"
    start_servers "$@"
    launch -m megatron_rlvr.train "$@" "${server_override[@]}"
    finish
}

# A tool under torchrun on the training nodes, with the same survival but no preflight.
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
server_step=''
