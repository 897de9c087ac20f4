# What marlinctl does in vLLM, measured on a GPU machine without network: one engine after the other, each with a time limit.
#
#     OUT=FOLDER bash benchmarks/vllm_serve.sh KIT STEP ..          in the repository
#
# KIT: a folder with kit.tar.xz.* , which holds vLLM 0.26.0 and what it needs beside torch. Logs go to $OUT/vllm_serve.tgz, lines that begin
# with SERVE or STEP to stdout. A step that fails leaves the others alone; its last lines are shown.
#
#     unpack                 the kit, and an entry point for this working tree
#     small                  tokens of a small random model, native and through the linear kernel; references; damaged folders
#     repack                 words to tiles on the GPU
#     kernels:NAME           1 and 16 requests, and the kernels that a token's time is
#     time:NAME              fp16 ct marlin marlin_24 ct-head marlin-head marlin_24-head; time:ct:machete and time:ct:marlin with vLLM's kernels
#     real:FOLDER            tokens of a native folder of a real model in each format that it can be packed to, and references; ids.json beside
#                            the folder has the text's tokens where it holds no tokenizer
#     two                    the small model on two GPUs
#     time2:NAME             as time:, over two GPUs
set -u
kit=$(cd "$1" && pwd); shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
serve="python3 $here/benchmarks/vllm_serve.py"; models="python3 $here/benchmarks/vllm_models.py"
work=/tmp/vllm_serve; logs=$work/logs; mkdir -p $logs "$OUT"
start=$(date +%s)
# Over several GPUs. Without NVLink multicast: not every machine can have it.
apart="VLLM_ENABLE_V1_MULTIPROCESSING=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0 VLLM_ALLREDUCE_USE_FLASHINFER=0"
apart="$apart NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1"
step() { echo "STEP [$(( $(date +%s) - start )) s] $*"; }

export PYTHONPATH=/tmp/vk:/tmp/site:$here PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CACHE_ROOT=/tmp/vcache TRITON_CACHE_DIR=/tmp/vcache/triton TORCHINDUCTOR_CACHE_DIR=/tmp/vcache/inductor VLLM_USE_FLASHINFER_SAMPLER=0
export MARLINCTL_CACHE=/tmp/vcache/marlinctl CUDA_CACHE_PATH=/tmp/vcache/cuda CUDA_CACHE_MAXSIZE=2000000000

run() { # NAME SECONDS COMMAND ..: to a log, then what matters of it
  local name=$1 limit=$2; shift 2
  local began=$(date +%s)
  timeout "$limit" "$@" > "$logs/$name.log" 2>&1
  local code=$?
  grep -E '^SERVE|vllm.marlinctl|marlinctl\]|Using .*(Kernel|attention)|kernels for .* shapes|Graph capturing|torch.compile took|Loading weights took' "$logs/$name.log" | cut -c1-400
  [ $code = 0 ] || grep -v '^SERVE' "$logs/$name.log" | tail -"${TAIL:-20}" | cut -c1-300
  tar -C $work -czf "$work/$name.tgz" logs && mv "$work/$name.tgz" "$OUT/vllm_serve.tgz"  # after each: a limit may end us
  step "$name: exit $code, $(( $(date +%s) - began )) s"
}

unpack() {
  [ -f /tmp/vk/.ok ] || { mkdir -p /tmp/vk && cat "$kit"/kit.tar.xz.* | xz -dc -T4 | tar -xf - -C /tmp/vk && touch /tmp/vk/.ok; }
  python3 - "$here" <<'P'
import sys, tomllib
from pathlib import Path
project = tomllib.loads((Path(sys.argv[1]) / "pyproject.toml").read_text())["project"]
info = Path("/tmp/site/marlinctl-0.1.0.dist-info")
info.mkdir(parents=True, exist_ok=True)
(info / "METADATA").write_text("Metadata-Version: 2.1\nName: marlinctl\nVersion: 0.1.0\n")
lines = [line for group, points in project["entry-points"].items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
(info / "entry_points.txt").write_text("\n".join(lines) + "\n")
P
  [ -d $work/shapes ] || $models shapes $work/shapes
  [ -d $work/small ] || $models random $work/small
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
  step unpacked
}

small() {
  run small-marlin 120 $serve tokens $work/small/marlin $work/small-marlin.json
  run small-damaged 90 $serve damaged $work/small/marlin &
  run small-marlin_24 120 $serve tokens $work/small/marlin_24 $work/small-marlin_24.json
  wait
  run small-ct 120 $serve tokens $work/small/ct $work/small-ct.json
  run small-reference 90 $serve reference $work/small/ct $work/small-*.json
}

real() { # FOLDER: each format that the folder can be packed to has the same weights
  local folder=$1 name=real-$(basename "$1")
  for format in ct marlin; do
    [ -d $work/$name-$format ] || run $name-pack-$format 90 python3 -m marlinctl pack "$folder" $work/$name-$format --format $format -q
  done
  ln -sfn "$folder" $work/$name-native
  local text=$(dirname "$folder")/ids.json
  [ -f "$text" ] || { text=$work/text.txt; cat $here/docs/*.md > $text; }
  for format in native marlin ct; do
    run $name-$format 150 $serve tokens $work/$name-$format $work/$name-$format.json --text "$text"
  done
  run $name-reference 120 $serve reference $work/$name-ct $work/$name-*.json
}

for what in "$@"; do
  case $what in
    unpack) unpack ;;
    small) small ;;
    repack) run repack 60 $serve repack ;;
    time:*:machete) name=${what#time:}; name=${name%:machete}
      run time-$name-machete 170 env VLLM_DISABLED_KERNELS=MarlinctlLinearKernel $serve time $work/shapes/$name $name-machete ;;
    time:*:marlin) name=${what#time:}; name=${name%:marlin}
      run time-$name-marlin 170 env VLLM_DISABLED_KERNELS=MarlinctlLinearKernel,MacheteLinearKernel $serve time $work/shapes/$name $name-marlin ;;
    kernels:*) run kernels-${what#kernels:} 170 $serve time $work/shapes/${what#kernels:} ${what#kernels:} --batch 1,16 --repeats 3 --kernels ;;
    time:*) run time-${what#time:} 170 $serve time $work/shapes/${what#time:} ${what#time:} ;;
    real:*) real "$(cd "${what#real:}" && pwd)" ;;
    time2:*) run time2-${what#time2:} 170 env $apart $serve time $work/shapes/${what#time2:} ${what#time2:}-2 --devices 2 ;;
    two)
      run two 150 env $apart $serve tokens $work/small/marlin $work/two-marlin.json --devices 2
      run two_24 150 env $apart $serve tokens $work/small/marlin_24 $work/two-marlin_24.json --devices 2
      run two-reference 90 $serve reference $work/small/ct $work/two-marlin.json $work/two-marlin_24.json ;;
    *) echo "no step $what"; exit 2 ;;
  esac
done
