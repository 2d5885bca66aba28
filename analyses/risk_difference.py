"""How much likelier tokens of one class of text are to choose an expert than those of another, words included.

    python analyses/risk_difference.py RUN [--json] [--rows N]

Compare `q` with `token_q`: the latter takes every token for independent, and finds too much wherever tokens of a sequence
route alike. For preferences beyond the words, see `family_specialisation.py` and `correctness_specialisation.py`.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("risk_difference"))
