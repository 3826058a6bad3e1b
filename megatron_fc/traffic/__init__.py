"""Memory traffic of training: a model of the bytes, counters of the bytes, reports of one rank and of many."""
