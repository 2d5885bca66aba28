"""Whether a token chooses the experts of the token before it.

    python analyses/repeat_choice.py RUN [--json] [--rows N]

Compare `repeat` with `expected`, what the same tokens in any order would show.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("repeat_choice"))
