"""Whether what routing tells of a step's kind holds for problems in other words: learnt on RUN, judged on others.

    python analyses/operation_transfer.py RUN --against OTHER [--json] [--rows N]

`gain` is what routing adds to words and place on problems of OTHER; `home` are the bits on held-out problems of RUN.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("operation_transfer"))
