"""These tests need lm-evaluation-harness, which `make test-eval` installs."""

import importlib.util


collect_ignore_glob = [] if importlib.util.find_spec("lm_eval") else ["test_*.py"]
