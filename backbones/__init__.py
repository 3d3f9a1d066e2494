"""GAN models that know nothing of feature quantisation, each readable alone in one file."""
