"""Whether one checkpoint answers more problems right than another, family by family, on the problems both answered.

    python analyses/accuracy_difference.py RUN --against OTHER [--json] [--rows N]

`only_first` and `only_other` count the problems that one of the two alone got right: all that a paired difference rests on.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("accuracy_difference"))
