"""How much routing changes from token to token, and whether it changes more where a reasoning step ends.

    python analyses/routing_churn.py RUN [--json] [--rows N]

Compare `churn` with `shuffled`, the same tokens in random order. `boundary_effect` compares equal pairs of words, equally far
apart, across a step boundary and inside a step; `overlap` says how many of the pairs can be compared at all.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("routing_churn"))
