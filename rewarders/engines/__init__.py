"""Search engines a rewarder can ask, one file each."""
