"""The ground floor: the network, what runs it, and what every script needs: README.md maps its files."""
