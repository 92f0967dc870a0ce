"""The demo in the browser: `i2vgen app`."""
