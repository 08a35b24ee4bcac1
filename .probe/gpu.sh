set -o pipefail
mkdir -p /root/trt; bash .probe/unpack.sh .trt /root/trt > /dev/null 2>&1 || { for f in .trt/*.so.1.xz; do :; done; }
export PYTHONPATH=$PWD/src:/root/trt
nvidia-smi --query-gpu=name --format=csv,noheader
ANABRANCH_REQUIRE_GPU=1 timeout 560 python -m pytest -v -m gpu -n 10 -p no:cacheprovider -p no:benchmark --timeout 120 --timeout-method thread --evidence $OUT/gpu_tests.json tests/gpu > $OUT/log.txt 2>&1
echo rc $?; tail -5 $OUT/log.txt; grep -E "^(FAILED|ERROR)" $OUT/log.txt | cut -c1-250
