"""Which experts wrong solutions choose more or less often than right ones of the same family, at equal tokens.

    python analyses/correctness_specialisation.py RUN [--json] [--rows N]

A positive `log2_ratio` is an expert of wrong solutions, a negative one of right ones. Problems answered wrong are harder, and
may differ in more than the answer: read it as a trace of trouble, not as its cause.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("correctness_specialisation"))
