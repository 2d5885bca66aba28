"""How far the token itself decides which experts are chosen.

    python analyses/vocabulary_specialisation.py RUN [--json] [--rows N]

`share` is measured on sequences that had no part in finding the favourite; `same_tokens` is what the same number reads without
that care, and `chance` what it reads when token ids are dealt at random.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("vocabulary_specialisation"))
