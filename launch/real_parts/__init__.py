"""The parts of ``launch/real.sh``: which they are, how they are fetched, and the manifests of the recordings among them."""
