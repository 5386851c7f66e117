"""The threads that tensor operations on a CPU are shared out to."""

import ctypes

# `omp_pause_soft` of OpenMP 5.0.
SOFT = 1


def release_pool() -> None:
    """End the threads that share the operations of the calling thread; its next operation starts new ones.

    OpenMP keeps them for every thread that has ever computed. Where two have, it counts more of them than there are
    cores, and lets all sleep between two operations: a thread that decodes then takes up to 1.8 times as long (GNU
    OpenMP, two cores). OpenMPs that cannot do so, and torch builds without, are left as they are.
    """
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return
    pause(SOFT)
