#!/usr/bin/env bash
# What a job has: its nodes, its place in Slurm's records, and the Python that its steps start. Sourced by common.sh, whose
# settings it reads.

# Set here for common.sh and attempts.sh, too, which shellcheck does not see.
# shellcheck disable=SC2034
gpus='' # GPUs per node that a script requests, in a dry run

# --- Nodes: what Slurm allocated, or in a dry run what the script requests ---------------------------------------------
# Refuse a setting that is not a positive whole number. Bash would evaluate it as an expression, which can hold commands.
check_number() { # NAME
    [[ ${!1} =~ ^[1-9][0-9]{0,8}$ ]] || refuse "$1 must be a positive whole number, found '${!1}'"
}

describe_job() {
    local count setting
    if [ -n "$RLVR_DRY_RUN" ]; then # what the script requests, even if this shell runs within a job
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
        refuse "this is a batch script: sbatch $0, or RLVR_DRY_RUN=1 bash $0 to see its commands"
    fi
    server_nodes=0
    case $RLVR_SERVERS in
        none | colocated) ;;
        *)
            [[ $RLVR_SERVERS =~ ^nodes:([1-9][0-9]{0,5})$ ]] ||
                refuse "RLVR_SERVERS must be none, colocated or nodes:N, found '$RLVR_SERVERS'"
            server_nodes=${BASH_REMATCH[1]}
            ;;
    esac
    for setting in RLVR_PROCESSES_PER_NODE RLVR_MAX_TRIES RLVR_PREFLIGHT_SECONDS RLVR_SERVER_SECONDS; do
        check_number "$setting"
    done
    train_nodes=$((${#nodes[@]} - server_nodes))
    if [ "$train_nodes" -lt 1 ]; then
        refuse "RLVR_SERVERS=$RLVR_SERVERS leaves none of ${#nodes[@]} nodes to train: request more nodes"
    fi
    # torchrun numbers nodes in this order, so rank 0 is on the head.
    mapfile -t trainers < <(printf '%s\n' "${nodes[@]:0:train_nodes}" | LC_ALL=C sort)
    nodes=("${trainers[@]}" "${nodes[@]:train_nodes}")
    head=${nodes[0]}
    # A different port for every attempt, because a leftover process of the previous one may still hold its port.
    port=$((20000 + (10#${SLURM_JOB_ID//[!0-9]/0} * 7 + restart * 3) % 12000))
}

# Read the job's identity and attempt from Slurm's record rather than from the environment. sbatch passes its environment
# on, so a job that is submitted from within another job inherits the SLURM_* variables that Slurm does not set itself. It
# would requeue the array that it was submitted from, or give its steps the one core of an interactive session. And srun
# refuses two requests for memory at once.
read_record() {
    local record name version
    version=$(srun --version | sed -n 's/.* \([0-9]*\)\.\([0-9]*\).*/\1\2/p')
    if [ "${version:-9999}" -lt 2205 ]; then
        refuse "$(srun --version) is too old: before 22.05 the steps of a job cannot share its memory and GPUs"
    fi
    record=$(job_record)
    restart=$(job_field Restarts <<< "$record")
    job=$SLURM_JOB_ID
    # For scontrol, the id of an array element may name the whole array.
    [[ ! $record =~ ^JobId=[0-9]+' ArrayJobId='([0-9]+)' ArrayTaskId='([0-9]+)' ' ]] ||
        job=${BASH_REMATCH[1]}_${BASH_REMATCH[2]}
    # Cores per node, of the smallest node if they differ.
    cpus=$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
    # SLURM_EXPORT_ENV comes from sbatch --export and would hide this script's variables from its steps.
    for name in EXPORT_ENV MEM_PER_NODE MEM_PER_CPU MEM_PER_GPU CPUS_PER_TASK CPUS_PER_GPU TRES_PER_TASK GPUS_PER_TASK \
        NTASKS_PER_GPU NTASKS_PER_SOCKET NTASKS_PER_CORE CPU_BIND CPU_BIND_TYPE CPU_BIND_LIST CPU_BIND_VERBOSE \
        GPU_BIND DISTRIBUTION; do
        unset "SLURM_$name"
    done
    # In a job that requested GPUs or whole nodes, these variables are its own.
    grep -q '^   \(OverSubscribe=NO\|[A-Za-z]*T[Rr][Ee][Ss].*gres[:/]gpu\)' <<< "$record" ||
        unset SLURM_GPUS SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_JOB_GPUS
}

# --- Python ------------------------------------------------------------------------------------------------------------
# Set `step_options`, the options of every srun, and `python`, the command that starts Python on a node.
describe_environment() {
    local kind=${RLVR_ENVIRONMENT%%:*} value=${RLVR_ENVIRONMENT#*:} modules folder folders mounts=$PWD:$PWD
    IFS=, read -ra folders <<< "$RLVR_MOUNTS"
    for folder in "$RUN_DIRECTORY" ${folders[0]+"${folders[@]}"}; do mounts+=,$folder:$folder; done
    case $kind:$PWD$RUN_DIRECTORY in
        pyxis:*[:,]* | apptainer:*[:,]*) refuse "a container cannot mount a path with a colon or comma: $PWD, $RUN_DIRECTORY" ;;
    esac
    # Steps share all resources of the job. By default a step gets one core, and the memory that belongs to it.
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
        *) refuse "RLVR_ENVIRONMENT must begin with venv:, module:, pyxis: or apptainer:, found '$kind'" ;;
    esac
    [ "$kind" != venv ] || [ -x "${python[0]}" ] ||
        refuse "no ${python[0]}: run \`make setup\` in $PWD, or set RLVR_ENVIRONMENT to another environment"
    # The code of this folder, also where the environment or the container holds another copy of the project.
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
}

# A batch script is not a login shell, and the submitting shell need not be bash, so the definition of `module` must be
# found first. Neither that definition nor the modules are written for set -eu.
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
        refuse "\`module load $*\` on $(uname -n) ended with status $status and gave no python3:" \
            "set RLVR_ENVIRONMENT=module:NAME,NAME... to modules that the nodes have"
    fi
}
