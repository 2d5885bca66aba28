"""What predicts which experts are chosen.

    python analyses/routing_prediction.py RUN [--json] [--rows N]

Compare `saved` and `recall` of what is `known` with those of "load" and of "token".
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("routing_prediction"))
