"""Other people's frameworks, driven by or driving this network and its criterion."""
