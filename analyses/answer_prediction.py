"""How evenly a checkpoint spreads its work over the experts of a layer.

    python analyses/answer_prediction.py RUN [--json] [--rows N]

Compare `gini` and `max_vio` with their floors: a router without any preference shows that much after as many tokens.
`dead` experts were never chosen, `rare` ones less than a tenth as often as the even share.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("answer_prediction"))
