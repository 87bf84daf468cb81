"""Pure functions on arrays, one file per parallelism: the only home of explicit collectives."""
