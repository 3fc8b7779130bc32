"""`hf-sparse-cache bench`: a real workload through `generate()` on a real model, side by side with its rivals.

`workloads` (what is asked) → `contenders` (ways of serving it) → `runner` (in turn, request by request) → `results`
(one folder a run) → `metrics`, `plots` and `page` (what it says). Needs `pip install "hf_sparse_cache[bench]"`.
"""
