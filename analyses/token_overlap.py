"""Whether the same token is routed alike in different contexts.

    python analyses/token_overlap.py RUN [--json] [--rows N]

Compare `jaccard` of "same token" with that of "same token, another before" and "different token", and all with `chance`.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("token_overlap"))
