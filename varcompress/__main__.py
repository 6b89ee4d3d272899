"""`python -m varcompress`, and on several GPUs `torchrun -m varcompress distill …`."""

from varcompress.cli.app import main

main()
