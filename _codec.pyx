# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""Rounding of floats in host memory to whole numbers with scales, and back, in one pass over them each.

Used by `hf_sparse_cache.models.rounding` alone, which says what the numbers are, checks what it is given before it
asks for the unchecked loops, and does the same in torch on other devices and for other types of floats. Both give the
same bits: a number is one product, clamped and rounded to the nearest, to even where there are two; a result is one
product. `tests/models/test_codec.py` compares them.

What torch would read and write five times is read once here, in pieces that stay in the first cache, and results go
where they are wanted: floats are `outer` runs of `inner` neighbours each, `step` floats apart, so that a part of a
joined tensor can be written and a part of a live one be read. Groups are neighbours within a run.
"""

from libc.stdint cimport int16_t, uint8_t, uintptr_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #if defined(_MSC_VER)
    #define CODEC_INLINE static __forceinline
    #else
    #define CODEC_INLINE static inline __attribute__((always_inline))
    #endif
    /* One library for all processors: the loader takes what this one can. Wants GNU's compiler and loader. */
    #if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
    #define CODEC_CLONES __attribute__((target_clones("avx2", "default")))
    #else
    #define CODEC_CLONES
    #endif

    /* A loop over a group stays one, which becomes instructions for many numbers; unrolled it would not. */
    #if defined(__clang__)
    #define CODEC_LOOP _Pragma("clang loop vectorize(enable)")
    #elif defined(__GNUC__)
    #define CODEC_LOOP _Pragma("GCC unroll 1")
    #else
    #define CODEC_LOOP
    #endif

    #define CODEC_WINDOW 6  /* the most borders of one exponent */
    #define CODEC_MAGIC 12582912.0f  /* 1.5 * 2^23: in a sum with it the last bits are the nearest whole number */

    typedef struct {
        float borders[256 + CODEC_WINDOW];  /* ascending, infinite behind the last */
        int16_t starts[256];  /* by exponent: how many borders have a smaller one */
        float scales[256], inverse[256];
        float limit;
        int every, lowest, highest;
    } codec_grid;

    typedef struct {
        Py_ssize_t outer, inner, step, group;
    } codec_runs;

    /* A float where there are floats, or the first half of one where there are bfloat16. */
    CODEC_INLINE uint32_t codec_bits(const char *at, Py_ssize_t i, const int half)
    {
        uint32_t bits;
        uint16_t first;
        if (half) {
            memcpy(&first, at + 2 * i, 2);
            return (uint32_t) first << 16;
        }
        memcpy(&bits, at + 4 * i, 4);
        return bits;
    }

    CODEC_INLINE int codec_code(const codec_grid *grid, int32_t top)
    {
        float largest;
        int j, code = grid->starts[top >> 23];
        const float *borders = grid->borders + code;
        memcpy(&largest, &top, 4);
        for (j = 0; j < CODEC_WINDOW; j++) code += borders[j] < largest;
        code *= grid->every;
        code = code < grid->lowest ? grid->lowest : code;
        return code > grid->highest ? grid->highest : code;
    }

    CODEC_INLINE int codec_encode_by(const char *__restrict source, char *__restrict numbers,
                                     uint8_t *__restrict codes, const codec_grid *__restrict grid, codec_runs runs,
                                     const Py_ssize_t group, const int wide, const int half)
    {
        const float most = wide ? 32767.0f : 127.0f;
        Py_ssize_t o, i, j;
        int32_t top, size, most_bits;
        int fits = 1;
        memcpy(&most_bits, &most, 4);
        for (o = 0; o < runs.outer; o++) {
            for (i = 0; i < runs.inner; i += group) {
                const char *at = source + (o * runs.step + i) * (half ? 2 : 4);
                uint32_t bits;
                float x, largest, inverse;
                int code;
                top = 0;
                CODEC_LOOP
                for (j = 0; j < group; j++) {  /* of what is not negative, bits are in the order of the numbers */
                    size = (int32_t) (codec_bits(at, j, half) & 0x7fffffffu);
                    top = size > top ? size : top;
                }
                memcpy(&largest, &top, 4);
                fits &= largest <= grid->limit;
                code = codec_code(grid, top);
                *codes++ = (uint8_t) code;
                inverse = grid->inverse[code];
                CODEC_LOOP
                for (j = 0; j < group; j++) {
                    bits = codec_bits(at, j, half);
                    memcpy(&x, &bits, 4);
                    x *= inverse;
                    /* Clamped as a whole number: no branch, and nothing that could be one operation with the sum. */
                    memcpy(&bits, &x, 4);
                    size = (int32_t) (bits & 0x7fffffffu);
                    size = size < most_bits ? size : most_bits;
                    bits = (bits & 0x80000000u) | (uint32_t) size;
                    memcpy(&x, &bits, 4);
                    x += CODEC_MAGIC;
                    memcpy(&bits, &x, 4);
                    if (wide) {
                        int16_t number = (int16_t) bits;
                        memcpy(numbers + 2 * j, &number, 2);
                    } else {
                        numbers[j] = (char) bits;
                    }
                }
                numbers += group * (wide ? 2 : 1);
            }
        }
        return fits;
    }

    CODEC_INLINE void codec_decode_by(const char *__restrict numbers, const uint8_t *__restrict codes,
                                      const float *__restrict scales, char *__restrict target, codec_runs runs,
                                      const Py_ssize_t group, const int wide, const int half)
    {
        Py_ssize_t o, i, j;
        for (o = 0; o < runs.outer; o++) {
            for (i = 0; i < runs.inner; i += group) {
                char *at = target + (o * runs.step + i) * (half ? 2 : 4);
                const float scale = scales[*codes++];
                CODEC_LOOP
                for (j = 0; j < group; j++) {
                    float x;
                    if (wide) {
                        int16_t number;
                        memcpy(&number, numbers + 2 * j, 2);
                        x = (float) number * scale;
                    } else {
                        x = (float) (signed char) numbers[j] * scale;
                    }
                    if (half) {  /* to the nearest, to even; there is nothing infinite among them */
                        uint32_t bits;
                        uint16_t first;
                        memcpy(&bits, &x, 4);
                        first = (uint16_t) ((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
                        memcpy(at + 2 * j, &first, 2);
                    } else {
                        memcpy(at + 4 * j, &x, 4);
                    }
                }
                numbers += group * (wide ? 2 : 1);
            }
        }
    }

    /* Loops of a length that the compiler knows, for the groups that there mostly are. */
    #define CODEC_BY_GROUP(CALL) \
        switch (runs.group) { \
        case 16: CALL(16); break; \
        case 32: CALL(32); break; \
        default: CALL(runs.group); \
        }

    CODEC_CLONES
    static int codec_encode(const char *source, char *numbers, uint8_t *codes, const codec_grid *grid, codec_runs runs,
                            int wide, int half)
    {
        int fits = 1;
    #define CODEC_CALL(GROUP) \
        fits = wide ? half ? codec_encode_by(source, numbers, codes, grid, runs, GROUP, 1, 1) \
                           : codec_encode_by(source, numbers, codes, grid, runs, GROUP, 1, 0) \
                    : half ? codec_encode_by(source, numbers, codes, grid, runs, GROUP, 0, 1) \
                           : codec_encode_by(source, numbers, codes, grid, runs, GROUP, 0, 0)
        CODEC_BY_GROUP(CODEC_CALL)
    #undef CODEC_CALL
        return fits;
    }

    CODEC_CLONES
    static void codec_decode(const char *numbers, const uint8_t *codes, const float *scales, char *target,
                             codec_runs runs, int wide, int half)
    {
    #define CODEC_CALL(GROUP) \
        if (wide) \
            if (half) codec_decode_by(numbers, codes, scales, target, runs, GROUP, 1, 1); \
            else codec_decode_by(numbers, codes, scales, target, runs, GROUP, 1, 0); \
        else \
            if (half) codec_decode_by(numbers, codes, scales, target, runs, GROUP, 0, 1); \
            else codec_decode_by(numbers, codes, scales, target, runs, GROUP, 0, 0)
        CODEC_BY_GROUP(CODEC_CALL)
    #undef CODEC_CALL
    }
    """
    int CODEC_WINDOW
    ctypedef struct codec_grid:
        float[262] borders
        int16_t[256] starts
        float[256] scales
        float[256] inverse
        float limit
        int every, lowest, highest
    ctypedef struct codec_runs:
        Py_ssize_t outer, inner, step, group
    int codec_encode(
        const char *source, char *numbers, uint8_t *codes, const codec_grid *grid, codec_runs runs, int wide, int half
    ) nogil
    void codec_decode(
        const char *numbers, const uint8_t *codes, const float *scales, char *target, codec_runs runs, int wide,
        int half
    ) nogil

cdef extern from "<math.h>":
    const float INFINITY

cdef extern from "<string.h>":
    void *memcpy(void *target, const void *source, size_t count) nogil


cdef unsigned int exponent_of(float value) noexcept:
    cdef unsigned int bits
    memcpy(&bits, &value, 4)
    return bits >> 23


cdef class Codec:
    """The scales of one type of whole numbers.

    Args:
        borders: between the scales that are used, positive and ascending, 255 at most.
        scales, inverse: by code, shape (256,) each.
        every: every how many-th code is used.
        lowest, highest: codes of the smallest and of the largest scale.
        limit: what no scale holds any more.

    Raises:
        ValueError: a table is of another length, or borders or codes would lead outside of one.
    """

    cdef codec_grid grid

    def __init__(
        self, const float[::1] borders not None, const float[::1] scales not None, const float[::1] inverse not None,
        int every, int lowest, int highest, float limit,
    ):
        cdef Py_ssize_t i, count = borders.shape[0]
        cdef int exponent, last = -1, seen = 0
        if count > 255 or scales.shape[0] != 256 or inverse.shape[0] != 256 or not 0 <= lowest <= highest < 256:
            raise ValueError(
                f"a codec has 255 borders at most, two tables of 256 scales and codes within them, not {count}, "
                f"{scales.shape[0]}, {inverse.shape[0]} and {lowest} to {highest}"
            )
        for i in range(count):
            exponent = exponent_of(borders[i])
            seen = seen + 1 if exponent == last else 1
            last = exponent
            if not (borders[i - 1] if i > 0 else 0.0) < borders[i] < INFINITY or seen > CODEC_WINDOW:
                raise ValueError(f"borders[{i}] is {borders[i]}: not ascending, or one of too many of its size")
        for i in range(count + CODEC_WINDOW):
            self.grid.borders[i] = borders[i] if i < count else INFINITY
        last = 0
        for exponent in range(256):
            while last < count and <int> exponent_of(borders[last]) < exponent:
                last += 1
            self.grid.starts[exponent] = last
        for i in range(256):
            self.grid.scales[i], self.grid.inverse[i] = scales[i], inverse[i]
        self.grid.every, self.grid.lowest, self.grid.highest = every, lowest, highest
        self.grid.limit = limit

    def encode(self, tuple addresses not None, tuple runs not None, bint wide, bint half):
        """Write whole numbers and codes, both without gaps; whether the scales hold all that was read.

        Args:
            addresses: of the floats, of the numbers, and of the codes.
            runs: (outer, inner, step, group) of the floats; an inner run holds whole groups.
            wide: numbers of 16 bits rather than 8.
            half: the floats are bfloat16 rather than float32.
        """
        cdef uintptr_t source, numbers, codes
        cdef codec_runs shape
        cdef bint fits
        source, numbers, codes = addresses
        shape.outer, shape.inner, shape.step, shape.group = runs
        with nogil:
            fits = codec_encode(
                <const char *> source, <char *> numbers, <uint8_t *> codes, &self.grid, shape, wide, half
            )
        return fits

    def decode(self, tuple addresses not None, tuple runs not None, bint wide, bint half):
        """Write floats from whole numbers and codes.

        Args:
            addresses: of the numbers, of the codes, and of the floats.
            runs, wide, half: as of `encode`.
        """
        cdef uintptr_t numbers, codes, target
        cdef codec_runs shape
        numbers, codes, target = addresses
        shape.outer, shape.inner, shape.step, shape.group = runs
        with nogil:
            codec_decode(
                <const char *> numbers, <const uint8_t *> codes, self.grid.scales, <char *> target, shape, wide, half
            )
