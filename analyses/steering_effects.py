"""What steering vectors made of a run do to the model (`ling-probe steer` makes and tries them).

    python analyses/steering_effects.py RUN [--json] [--rows N]

Compare `effect` with `control`, that of vectors of the same values given to other experts of like load: a gain that these bring
too is not the vector's.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("steering_effects"))
