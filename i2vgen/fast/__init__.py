"""The same numbers sooner: subclasses of the plain modules, put in by `apply` and taken out by `remove`."""
