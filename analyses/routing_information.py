"""Whether the chosen experts know more about a step than its tokens and their place: read this before any specialisation.

    python analyses/routing_information.py RUN [--json] [--rows N]

Follow `bits` from given "nothing" to "token and position": what is left there is not the words. Rows without a layer are means.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("routing_information"))
