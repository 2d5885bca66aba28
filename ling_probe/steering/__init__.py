"""Steer a model through its routers' bias: towards the experts that one class of text chooses more than another.

1. Take the difference of how often two classes of a run's tokens choose each expert, the same tokens compared.    `contrast`
2. Write it down as a vector: a value for every expert, the largest 1.                                              `vector`
3. On other problems, add it to the choice scores, times a strength; weights stay unbiased, groups stay groups.      `trial`
4. Compare with vectors of the same values given to other experts of like load.                                      `trial`

After SteerMoE (arXiv 2509.09660), which counts words too and compares with nothing.
"""

from ling_probe.steering.contrast import run_vector, steering_vector
from ling_probe.steering.trial import STRENGTHS, Trial, held_out, steer
from ling_probe.steering.vector import Measure, SteeringVector, vector_folder

__all__ = [
    "STRENGTHS",
    "Measure",
    "SteeringVector",
    "Trial",
    "held_out",
    "run_vector",
    "steer",
    "steering_vector",
    "vector_folder",
]
