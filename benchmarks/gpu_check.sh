#!/bin/bash
# Build, test, sanitize and measure the CUDA half on a machine with a GPU, in one call of under nine
# minutes:  benchmarks/gpu_check.sh OUTDIR
# Each stage runs whatever became of the others; OUTDIR gets a log a stage, kernels.csv and
# summary.txt, and the summary is printed last. Needs nvcc, a C++ compiler and python3 with torch;
# wheels that are missing may lie in .whl/.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:?"usage: gpu_check.sh OUTDIR"}
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
: >"$summary"
started=$SECONDS
export PYTHONUNBUFFERED=1 ESFAST_CUDA_ARCHS=${ESFAST_CUDA_ARCHS:-90}
python=${PYTHON:-python3}

if compgen -G ".whl/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target /tmp/esfast-site .whl/*.whl >"$out/wheels.log" 2>&1
  export PYTHONPATH=/tmp/esfast-site
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# stage NAME SECONDS COMMAND...: runs it with a limit, keeps its log, notes how it went.
stage() {
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  printf '%-10s exit %3d  %4ds  %s\n' "$name" "$code" $((SECONDS - begun)) \
    "$(grep -v '^ *$' "$out/$name.log" | tail -1 | cut -c1-110)" | tee -a "$summary"
  return "$code"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  nvcc --version | tail -1
  "$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
}
export python
export -f machine

stage machine 30 bash -c machine
stage build 120 "$python" setup.py build_ext --inplace
stage info 30 "$python" -c "
from esfast import _core
print(_core.build_info(), _core.cuda_devices(), _core.target())"
stage small 60 "$python" benchmarks/gpu_small.py
stage tests 170 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py --maxfail 8
stage machinecode 20 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_machine_code.py
left=$((530 - (SECONDS - started)))
stage kernels $((left < 190 ? left : 190)) "$python" benchmarks/gpu_kernels.py "$out/kernels.csv" \
  --budget 150
for tool in memcheck racecheck; do
  left=$((530 - (SECONDS - started)))
  [ "$left" -gt 15 ] || break
  stage "$tool" $((left < 70 ? left : 70)) compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --kernel-name kernel_substring=esfast "$python" benchmarks/gpu_small.py
done

{
  echo
  echo "total $((SECONDS - started)) s"
  tail -40 "$out/kernels.log" 2>/dev/null | grep -v Warning
  grep -E "^(FAILED|ERROR)" "$out/tests.log" 2>/dev/null | cut -c1-150 | head -20
} >>"$summary"
echo
cat "$summary"
