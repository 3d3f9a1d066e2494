import os

from fq import search

# Tests compare runs of several processes to the bit: none of them may choose its product by a clock.
os.environ.setdefault(search.GEMM_VARIABLE, search._usable_products()[0])
