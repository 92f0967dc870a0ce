"""The networks as the paper draws them, each with one way through its forward."""
