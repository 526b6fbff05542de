/* LSQ+ fake quantisation of float32 numbers on a CPU, in one pass each way; the formulas stand in fake_quantise.py.

   n: numbers; scale, beta: one number each, beta NULL for none; least: of |scale|; low, high: levels. Compiled without
   fused multiply-adds, each result is what torch's operations give one after another. Sums are those of blocks, added
   up in turn, so that they do not depend on the number of threads. */
#include <math.h>
#include <stdlib.h>

#define BLOCK 4096
#define THREADED(n) num_threads(threads) if((n) > 8 * BLOCK)

static inline float at_least(float v, float low) { return v < low ? low : v; }          /* NaN stays NaN, as in torch */
static inline float at_most(float v, float high) { return v > high ? high : v; }

extern "C" void quantise(long n, const float *x, const float *scale, const float *beta, float *y, float low, float high,
                         float least, int threads)
{
    const float step = at_least(fabsf(*scale), least), offset = beta ? *beta : 0;
    #pragma omp parallel for simd THREADED(n)
    for (long i = 0; i < n; i++)
        y[i] = rintf(at_most(at_least((x[i] - offset) / step, low), high)) * step + offset;
}

/* dx, dscale[0], and dbeta[0] unless it is NULL; factor: g */
extern "C" void quantise_backward(long n, const float *dy, const float *x, const float *scale, const float *beta,
                                  float *dx, float *dscale, float *dbeta, float low, float high, float least,
                                  double factor, int threads)
{
    const float step = at_least(fabsf(*scale), least), offset = beta ? *beta : 0;
    const long blocks = (n + BLOCK - 1) / BLOCK;
    float *of_step = (float *)malloc(2 * blocks * sizeof(float)), *of_beta = of_step + blocks;
    #pragma omp parallel for THREADED(n)
    for (long block = 0; block < blocks; block++) {
        const long start = block * BLOCK, end = start + BLOCK < n ? start + BLOCK : n;
        float sum_step = 0, sum_beta = 0;
        #pragma omp simd reduction(+:sum_step, sum_beta)
        for (long i = start; i < end; i++) {
            const float v = (x[i] - offset) / step, q = at_most(at_least(v, low), high), g = dy[i];
            const float inside = q == v ? g : 0;
            sum_step += g * rintf(q) - inside * v;
            sum_beta += g - inside;
            dx[i] = inside;
        }
        of_step[block] = sum_step;
        of_beta[block] = sum_beta;
    }
    double sum_step = 0, sum_beta = 0;
    for (long block = 0; block < blocks; block++) {
        sum_step += of_step[block];
        sum_beta += of_beta[block];
    }
    free(of_step);
    *dscale = factor * sum_step * ((*scale > 0) - (*scale < 0));
    if (dbeta)
        *dbeta = factor * sum_beta;
}
