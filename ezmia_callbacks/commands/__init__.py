"""The commands of `ezmia`, a module each: options in, library calls, a table or JSON out."""
