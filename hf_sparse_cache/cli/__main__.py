"""`python -m hf_sparse_cache.cli`, for where the script is not on the path."""

from . import main


main()
