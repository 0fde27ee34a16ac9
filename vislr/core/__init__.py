"""What every room needs: reports, named errors, atomic files, the registry, the step context."""
