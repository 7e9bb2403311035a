"""Does a run fit, how long does it take, what does it cost."""
