"""What people build on curvature matrices; made of the public names of the package only."""
