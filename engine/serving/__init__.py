"""A model behind an HTTP endpoint: the features, the code and the bits of batch scoring."""
