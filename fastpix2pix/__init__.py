"""Train pix2pix (Isola et al., CVPR 2017) as fast as the hardware allows."""
