T=tests/gpu
bash .probe/some.sh $T/test_sessions_contract.py $T/test_fragments_contract.py "$T/test_stress.py::test_contexts_are_built_while_other_code_works" "$T/test_contract.py::test_clause6_compiling_beside_other_codes_capture_does_it_no_harm" $T/test_ranges_contract.py -k "sessions or fragments or contexts_are_built or no_harm or dropped"
