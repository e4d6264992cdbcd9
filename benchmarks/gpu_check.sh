#!/bin/bash
# shellcheck disable=SC2329  # some functions are called through bash -c
# Build, test, sanitize and measure the CUDA half on a machine with a GPU, in one call of under nine
# minutes:  benchmarks/gpu_check.sh OUTDIR
# Each stage runs whatever became of the others, in the time that is left. OUTDIR gets summary.txt
# (printed last), log.txt (all that the stages said), kernels.csv, bench.csv and roofline.png. Needs
# nvcc, a C++ compiler and python3 with its headers, torch and setuptools; pytest, hypothesis,
# transformers, rich, safetensors and what they need, if they are missing, as wheels in .whl/ (ninja
# and matplotlib too, though it goes on without). ESFAST_COMMIT names the commit of a copy without
# .git. Exits 1 where a stage failed or found no time.
set -u
SECONDS=0
readonly END=520  # no stage begins or goes on later; stopping one takes up to 15 s more
out=${1:?"usage: gpu_check.sh OUTDIR"}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d) || exit 1
export REPO=$PWD WORK=$work PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 ESFAST_STRICT=1 ESFAST_CUDA_ARCHS=${ESFAST_CUDA_ARCHS:-90}
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # the machine's other packages may bring some
export PATH=$PATH:/usr/local/cuda/bin
summary=$out/summary.txt log=$out/log.txt failed=0
: >"$summary"
: >"$log"

# stage NAME SECONDS COMMAND...: runs it within that time and what is left; keeps what it said, and
# notes how it went and its last line. An interrupt comes first, so that Python says where it was.
stage() {
  local name=$1 limit=$2 begun=$SECONDS left=$((END - SECONDS)) code last
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    printf '%-10s no time left\n' "$name" | tee -a "$summary"
    failed=1
    return 1
  fi
  timeout -s INT -k 15 "$limit" "$@" >"$work/$name.log" 2>&1
  code=$?
  [ "$code" -eq 0 ] || failed=1
  last=$(grep -av '^ *$' "$work/$name.log" | tail -n 1 | cut -c1-150)
  printf '%-10s exit %3d  %4ds  %s\n' "$name" "$code" $((SECONDS - begun)) "$last" |
    tee -a "$summary"
  { printf '\n==== %s (exit %d)\n' "$name" "$code"; cat "$work/$name.log"; } >>"$log"
  return "$code"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  nvcc --version | tail -n 1
  c++ --version | head -n 1
  "$PYTHON" - <<'EOF'
import importlib.metadata as m, importlib.util as u, platform, sysconfig
from pathlib import Path
for name in ("setuptools", "ninja", "pybind11", "pytest", "hypothesis", "transformers",
             "safetensors", "rich", "matplotlib"):
    print(name, m.version(name) if u.find_spec(name) else "is missing")
print("Python.h:", (Path(sysconfig.get_path("include")) / "Python.h").is_file())
import torch
print("python", platform.python_version(), "torch", torch.__version__, torch.cuda.get_device_name())
EOF
}
# In an empty folder setuptools reads no pyproject.toml: old ones refuse this one's licence.
build() {
  mkdir -p "$WORK/build" && cd "$WORK/build" &&
    "$PYTHON" "$REPO/setup.py" -q build_ext --build-lib "$REPO"
}
# A compiler whose warnings nobody has seen yet must not cost the rest.
build_with_warnings() {
  export ESFAST_STRICT=0
  build
}
export -f machine build build_with_warnings

if compgen -G ".whl/*.whl" >/dev/null; then
  stage wheels 40 "$PYTHON" -m pip install --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$work/site" .whl/*.whl
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PATH=$PATH:$work/site/bin
fi
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}

stage machine 60 bash -c machine
stage build 150 bash -c build || stage rebuild 100 bash -c build_with_warnings
stage info 30 "$PYTHON" -c "
from esfast.info import info_lines
print('\n'.join(info_lines()))
from esfast import _core
print(_core.cuda_devices() or 'no CUDA device that this build can use')"
stage small 60 "$PYTHON" benchmarks/gpu_small.py
stage tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -o faulthandler_timeout=60 \
  --maxfail 12 tests/test_gpu.py tests/test_gpu_arithmetic.py
stage kernels 120 "$PYTHON" benchmarks/gpu_kernels.py "$out/kernels.csv" --budget 90
# Only our kernels are looked at, and no errors that a library's probing of the driver returns.
check=(--error-exitcode 9 --launch-timeout=0 --report-api-errors=no
  --kernel-name kernel_substring=esfast "$PYTHON" benchmarks/gpu_small.py)
# Torch's cache of device memory would hide what is read or written past a tensor's end.
stage memcheck 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck "${check[@]}"
stage racecheck 75 compute-sanitizer --tool racecheck "${check[@]}" --few
stage code 40 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_cuda_machine_code.py
plot=()
"$PYTHON" -c "import matplotlib" 2>/dev/null && plot=(--plot "$out/roofline.png")
stage bench 90 "$PYTHON" -m esfast bench --device cuda --parameters 1B --population 30 \
  --rounds 3 --csv "$out/bench.csv" "${plot[@]}"

{
  echo
  echo "total $SECONDS s"
  grep -aiE "error:|error #" "$work/build.log" | cut -c1-170 | head -n 8
  grep -aE "^(FAILED|ERROR)|^E  " "$work/tests.log" | cut -c1-170 | head -n 24
  for tool in memcheck racecheck; do
    grep -aE "^=+ +(Error|Invalid|ERROR|RACECHECK|Race)" "$work/$tool.log" | sort | uniq -c |
      sed "s/^/$tool: /" | cut -c1-170 | head -n 6
  done
  grep -av Warning "$work/kernels.log" | tail -n 40
} >>"$summary" 2>/dev/null
rm -r "$work"
echo
cat "$summary"
exit "$failed"
