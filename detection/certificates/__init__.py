"""Certificates: what a converted or exported file was compared with, and how far it is from that."""
