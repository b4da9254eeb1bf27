from dpp_jax.data.sources import Images
