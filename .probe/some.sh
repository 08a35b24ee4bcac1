export PYTHONPATH=$PWD/src
nvidia-smi --query-gpu=name --format=csv,noheader
(ANABRANCH_REQUIRE_GPU=1 timeout -k 5 ${LIMIT:-200} python -m pytest -v -m gpu -n ${N:-9} -p no:cacheprovider -p no:benchmark -o faulthandler_timeout=30 --timeout 60 --timeout-method thread --tb=short "$@" > $OUT/log.txt 2>&1; echo rc $?)
grep -E "^(FAILED|ERROR)" $OUT/log.txt | cut -c1-250; tail -2 $OUT/log.txt | cut -c1-200
