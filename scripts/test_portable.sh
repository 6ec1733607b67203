#!/usr/bin/env bash
# `make test-portable`: the tests as other machines round and as busy machines run them. Goes
# through all settings, each as long as `make test`, and says at the end which of them passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
results=() loops=() status=0
trap '[ ${#loops[@]} = 0 ] || kill "${loops[@]}"' EXIT
trap 'exit 130' INT TERM

try() {  # NAME VARIABLE=VALUE...
  echo "== $1"
  if env "${@:2}" "$python" -m pytest -n 2 --dist worksteal; then
    results+=("passed    $1")
  else
    results+=("FAILED    $1")
    status=1
  fi
}

# Each instruction set that the processor has: that of PyTorch's own kernels, of MKL and of oneDNN.
processor=$("$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability())') || exit
for set in default:COMPATIBLE:SSE41 avx2:AVX2:AVX2 avx512:AVX512:AVX512_CORE; do
  IFS=: read -r aten mkl onednn <<<"$set"
  case $aten:$processor in
    default:* | avx2:AVX2 | avx2:AVX512 | avx512:AVX512)
      try "$aten" ATEN_CPU_CAPABILITY="$aten" MKL_CBWR="$mkl" ONEDNN_MAX_CPU_ISA="$onednn" ;;
    *) results+=("left out  $aten: the processor has $processor") ;;
  esac
done
try "two threads" OMP_NUM_THREADS=2
for _ in 1 2 3 4; do
  while kill -0 $$; do :; done 2>/dev/null & # ends with this script, however that ends
  loops+=($!)
done
try "four busy loops beside it"
printf '%s\n' "== results" "${results[@]}"
exit "$status"
