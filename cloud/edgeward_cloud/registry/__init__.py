"""The TUF repository and the blob store. The only importer of tuf in the cloud."""

from edgeward_cloud.registry.blobs import BlobStore, BlobWriter
from edgeward_cloud.registry.repository import Conflict, Registry

__all__ = ["BlobStore", "BlobWriter", "Conflict", "Registry"]
