/* A Vulkan device with SMALL_DEVICE_MB megabytes, for LD_PRELOAD. Knows Vulkan's allocations; nothing of ggml.

   ggml-vulkan takes every function from vkGetInstanceProcAddr, so this library's comes first and hands out its own
   functions in place of those that allocate, free and report memory; all others are the loader's.

   SMALL_DEVICE_MB=24      an allocation that would pass 24 MB in all is refused as a full device refuses it
   SMALL_DEVICE_TELLS=1    the device reports those 24 MB and what is left of them; without it it promises all of the
                           machine's memory and refuses nevertheless, as one does whose driver reports no budget
   SMALL_DEVICE_VERBOSE=1  refusals go to stderr, and at the end what is still held and the most that was

   cc -shared -fPIC -o small_device.so small_device.c -ldl */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>

#define MAX_ALLOCATIONS 65536
#define MB 1e6

/* The loader's functions, as they were when ggml asked for them. */
static PFN_vkAllocateMemory next_allocate;
static PFN_vkFreeMemory next_free;
static PFN_vkGetDeviceProcAddr next_device_function;
static PFN_vkGetPhysicalDeviceMemoryProperties next_properties;
static PFN_vkGetPhysicalDeviceMemoryProperties2 next_properties2;

static struct { VkDeviceMemory memory; VkDeviceSize bytes; } held[MAX_ALLOCATIONS];
static int n_held;
static VkDeviceSize total, most, limit; /* bytes; a limit of 0 is none */
static int tells, verbose;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void say_at_end(void) {
    fprintf(stderr, "small device: %.1f MB held at the end, %.1f MB at most\n", total / MB, most / MB);
}

__attribute__((constructor)) static void read_settings(void) {
    const char *megabytes = getenv("SMALL_DEVICE_MB");
    limit = megabytes ? (VkDeviceSize)(atof(megabytes) * MB) : 0;
    tells = getenv("SMALL_DEVICE_TELLS") != NULL;
    verbose = getenv("SMALL_DEVICE_VERBOSE") != NULL;
}

/* Both with the lock held. */
static void note(VkDeviceMemory memory, VkDeviceSize bytes) {
    if (verbose && !most) atexit(say_at_end); /* not in processes that never touch a device */
    if (n_held == MAX_ALLOCATIONS) abort();   /* never seen; a wrong count would be worse */
    held[n_held].memory = memory;
    held[n_held++].bytes = bytes;
    total += bytes;
    if (total > most) most = total;
}

static void forget(VkDeviceMemory memory) {
    for (int i = 0; i < n_held; i++)
        if (held[i].memory == memory) {
            total -= held[i].bytes;
            held[i] = held[--n_held];
            return;
        }
}

static VKAPI_ATTR VkResult VKAPI_CALL allocate(VkDevice device, const VkMemoryAllocateInfo *info,
                                               const VkAllocationCallbacks *callbacks, VkDeviceMemory *memory) {
    VkResult result = VK_ERROR_OUT_OF_DEVICE_MEMORY;
    pthread_mutex_lock(&lock);
    if (!limit || total + info->allocationSize <= limit) {
        result = next_allocate(device, info, callbacks, memory);
        if (result == VK_SUCCESS) note(*memory, info->allocationSize);
    } else if (verbose)
        fprintf(stderr, "small device: refused %.1f MB, %.1f MB held\n", info->allocationSize / MB, total / MB);
    pthread_mutex_unlock(&lock);
    return result;
}

static VKAPI_ATTR void VKAPI_CALL release(VkDevice device, VkDeviceMemory memory,
                                          const VkAllocationCallbacks *callbacks) {
    pthread_mutex_lock(&lock);
    forget(memory);
    pthread_mutex_unlock(&lock);
    next_free(device, memory, callbacks);
}

static void shrink(VkPhysicalDeviceMemoryProperties *properties) {
    for (uint32_t i = 0; tells && limit && i < properties->memoryHeapCount; i++)
        if (properties->memoryHeaps[i].size > limit) properties->memoryHeaps[i].size = limit;
}

static VKAPI_ATTR void VKAPI_CALL properties(VkPhysicalDevice device, VkPhysicalDeviceMemoryProperties *found) {
    next_properties(device, found);
    shrink(found);
}

static VKAPI_ATTR void VKAPI_CALL properties2(VkPhysicalDevice device, VkPhysicalDeviceMemoryProperties2 *found) {
    next_properties2(device, found);
    shrink(&found->memoryProperties);
    for (VkBaseOutStructure *more = found->pNext; tells && limit && more; more = more->pNext)
        if (more->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT) {
            VkPhysicalDeviceMemoryBudgetPropertiesEXT *budget = (void *)more;
            for (uint32_t i = 0; i < found->memoryProperties.memoryHeapCount; i++) {
                budget->heapBudget[i] = limit;
                budget->heapUsage[i] = total;
            }
        }
}

static PFN_vkVoidFunction ours(const char *name, PFN_vkVoidFunction next);

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL device_function(VkDevice device, const char *name) {
    return ours(name, next_device_function(device, name));
}

/* The function to hand out for a name: ours, which calls the loader's, or the loader's. */
static PFN_vkVoidFunction ours(const char *name, PFN_vkVoidFunction next) {
#define REPLACE(vulkans_name, next_one, own) \
    if (next && !strcmp(name, vulkans_name)) return next_one = (void *)next, (PFN_vkVoidFunction)own
    REPLACE("vkAllocateMemory", next_allocate, allocate);
    REPLACE("vkFreeMemory", next_free, release);
    REPLACE("vkGetDeviceProcAddr", next_device_function, device_function);
    REPLACE("vkGetPhysicalDeviceMemoryProperties", next_properties, properties);
    REPLACE("vkGetPhysicalDeviceMemoryProperties2", next_properties2, properties2);
    REPLACE("vkGetPhysicalDeviceMemoryProperties2KHR", next_properties2, properties2);
    return next;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetInstanceProcAddr(VkInstance instance, const char *name) {
    static PFN_vkGetInstanceProcAddr next;
    if (!next) { /* Python loads ggml privately, so RTLD_NEXT would not find the loader behind it */
        void *loader = dlopen("libvulkan.so.1", RTLD_LAZY);
        next = loader ? (PFN_vkGetInstanceProcAddr)dlsym(loader, "vkGetInstanceProcAddr") : NULL;
    }
    return ours(name, next ? next(instance, name) : NULL);
}
