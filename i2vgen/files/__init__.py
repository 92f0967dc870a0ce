"""Everything that touches a disk: weights, pictures, videos and the records beside them."""
