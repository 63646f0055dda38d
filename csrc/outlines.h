// Outlines of the pieces of a class map that comes row by row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "outline_simplify.h"

namespace histoseg {

using Ring = std::vector<HalfPoint>;

// A piece: connected pixels (4-neighbours) of one class. Its rings are closed (the last point is the first) and simple.
// The outer one comes first and has a positive area (sum of x dy), holes have negative ones; rings touch one another
// in single points at most.
struct Piece {
    std::uint8_t id;
    std::vector<Ring> rings;
};

struct OutlineOptions {
    std::int64_t min_area;  // pieces and holes of fewer pixels are left out
    bool simplify;          // else outlines follow the edges of pixels
};

// Pieces of class 0, the background, are not wanted.
//
// Boundaries are kept as arcs between nodes (corners where three or more edges meet; the surroundings of the image
// count as a class), each once for both its sides, and simplified once: neighbours share their points, nothing
// overlaps or gaps. Arcs along the edge of the image are never simplified. What comes out depends on the rows alone.
// Memory: the boundaries of pieces that have not ended yet (8 bytes a turn, some 500 a piece or a hole), and a row.
class OutlineTracer {
public:
    OutlineTracer(std::int64_t width, const OutlineOptions& options);
    ~OutlineTracer();

    // Takes the next row and appends the pieces that ended above it, in the order of their last runs.
    void add_row(const std::uint8_t* row, std::ptrdiff_t stride, std::vector<Piece>& done);
    // Ends the image: appends all other pieces.
    void finish(std::vector<Piece>& done);

    std::int64_t width() const;
    std::int64_t rows() const;

private:
    class Impl;
    std::unique_ptr<Impl> impl_;
};

// What a pixel's height and width are multiplied by; fractions are for class maps of enlarged images.
struct OutlineScale {
    double down, across;
};

constexpr double kMinOutlineScale = 0.25, kMaxOutlineScale = 1 << 20;

// Appends the coordinates of a GeoJSON Polygon: an array of rings of [x, y], in pixels times `scale`, to a millionth.
void append_coordinates(const Piece& piece, const OutlineScale& scale, std::string& text);

}  // namespace histoseg
