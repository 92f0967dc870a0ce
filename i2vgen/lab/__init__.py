"""Looking into a network and changing it from outside: what researchers would otherwise fork a file for."""
